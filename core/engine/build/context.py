"""What a rank is built from, beside the configuration."""

from dataclasses import dataclass

import torch

from core.disk.progress import OnProgress
from core.engine.build.profile_run import OnPhase
from core.interfaces.comm import Comms
from core.interfaces.control import ModelFiles
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.settings.config import AppConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What a rank is built from, beside the configuration."""

    plugins: PluginManager
    files: ModelFiles
    plan: Plan
    rank: int
    comms: Comms
    device: torch.device
    local_ranks: int  # ranks that share this host's memory
    on_phase: OnPhase
    on_progress: OnProgress


def dtype_of(config: AppConfig) -> torch.dtype:
    """What weights, activations and cache are computed in; `config` is settled."""
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
