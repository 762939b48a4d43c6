"""From a model's files to the reader that its layers take their weights from."""

import torch

from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.loading.dummy import DummyReader
from core.loading.gguf import GGUFSource
from core.loading.reader import CheckpointReader, ProgressCallback
from core.loading.safetensors import SafetensorsSource


def open_weights(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dummy_seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> CheckpointReader | DummyReader:
    """The weights of one rank. Call `require_all_taken` once the model is built.

    `on_progress` gets (bytes done, bytes in all); the latter is 0 where it is not known.
    """
    if files.weight_format == "dummy":
        return DummyReader(dummy_seed, dtype, device, on_progress)
    if files.weight_format == "gguf":
        (path,) = files.weight_files
        return CheckpointReader(GGUFSource(path, dtype), dtype, device, on_progress)
    if not files.weight_files:
        raise ModelError("the model has no weight files")
    return CheckpointReader(SafetensorsSource(files.weight_files), dtype, device, on_progress)
