"""Folders with a NumPy file for each tensor. Imports no torch until they are opened."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.model_files.folder import folder_config, folder_files
from core.plugin.hookspecs import NoOptions

if TYPE_CHECKING:
    import torch

    from core.interfaces.weights import WeightSource


class NpyFormat:
    """Implements core.interfaces.checkpoint.CheckpointFormat."""

    needs = "a folder with weights/NAME.npy"
    hub_files = ("weights/*.npy",)

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, location: Path) -> bool:
        return any((location / "weights").glob("*.npy"))

    def stands_in(self, location: Path) -> bool:
        return False

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        config = folder_config(location, "weights/*.npy")
        files = folder_files(location, config)
        paths = sorted((location / "weights").glob("*.npy")) if with_weights else []
        if with_weights and config.get("dtype") is None and config.get("torch_dtype") is None:
            raise ModelError(f"{location / 'config.json'} has no dtype; add the weights' one")
        return msgspec.structs.replace(
            files, weight_files=[str(path) for path in paths], num_tensors=len(paths)
        )

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        from acme_checkpoint.source import NpySource

        return NpySource(files.weight_files)
