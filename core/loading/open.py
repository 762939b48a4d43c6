"""From a model's files to the reader that its layers take their weights from."""

import torch

from core.config import ModelConfig
from core.interfaces.control import ModelFiles
from core.loading.dummy import DummyReader
from core.loading.gguf import GGUFSource
from core.loading.progress import OnProgress
from core.loading.reader import CheckpointReader
from core.loading.safetensors import SafetensorsSource


def open_weights(
    model: ModelConfig,
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: OnProgress,
) -> CheckpointReader | DummyReader:
    """The weights of one rank. Call `finish` once the model is built."""
    if files.weight_format == "dummy":
        return DummyReader(model.dummy_seed, dtype, device, on_progress)
    if files.weight_format == "gguf":
        (path,) = files.weight_files
        return CheckpointReader(GGUFSource(path, dtype), dtype, device, on_progress)
    assert files.weight_format == "safetensors", files.weight_format
    return CheckpointReader(SafetensorsSource(files.weight_files), dtype, device, on_progress)
