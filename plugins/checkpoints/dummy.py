"""Weights that are made up (core.interfaces.checkpoint.WeightGenerator)."""

from typing import TYPE_CHECKING

from core.disk.progress import OnProgress
from core.plugin.hookspecs import NoOptions
from core.settings.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from core.interfaces.weights import OpenedWeights


class DummyWeights:
    """Seeded random weights in a model's real shapes."""

    def __init__(self, options: NoOptions) -> None:
        pass

    def generate(
        self,
        model: ModelConfig,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        on_progress: OnProgress,
        total_bytes: int,
    ) -> "OpenedWeights":
        from plugins.checkpoints._dummy_reader import DummyReader

        return DummyReader(model.dummy_seed, dtype, device, on_progress, total_bytes=total_bytes)
