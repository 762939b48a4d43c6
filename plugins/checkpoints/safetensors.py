"""Models in a Hugging Face folder (core.interfaces.checkpoint.CheckpointFormat)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core.disk.plain_files import read_json
from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.model_files.folder import folder_config, folder_files
from core.plugin.hookspecs import NoOptions
from plugins.checkpoints._safetensors.header import StoredTensor, read_header
from plugins.checkpoints._safetensors.tied_head import HEAD, stored_head_differs

if TYPE_CHECKING:
    import torch

    from core.interfaces.weights import WeightSource

MAX_INDEX_BYTES = 256 << 20  # of model.safetensors.index.json; DeepSeek-V3's has 9 MB
_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsFormat:
    """A folder with config.json, *.safetensors and tokenizer.json."""

    needs = "a folder"
    hub_files = ("*.safetensors",)

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, location: Path) -> bool:
        if location.suffix == ".gguf":  # by its name a file of weights, also where it is a folder
            return False
        try:
            return (location / _INDEX).exists() or any(location.glob("*.safetensors"))
        except OSError:
            return False

    def stands_in(self, location: Path) -> bool:
        return location.is_dir()

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        """Reads the headers of all weight files."""
        config = folder_config(location, "*.safetensors")
        weights: dict[Path, dict[str, StoredTensor]] = (
            _safetensors_files(location) if with_weights else {}
        )
        if weights and config.get("dtype") is None and config.get("torch_dtype") is None:
            config["dtype"] = _stored_dtype(weights)
        files = folder_files(location, config)
        return msgspec.structs.replace(
            files,
            weight_files=[str(path) for path in weights],
            warnings=[*_untie(config, weights), *files.warnings],
            num_tensors=sum(map(len, weights.values())),
        )

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        from plugins.checkpoints._safetensors.source import SafetensorsSource

        return SafetensorsSource(files.weight_files)


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
    index_path = folder / _INDEX
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
