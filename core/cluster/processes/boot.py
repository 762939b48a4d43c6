"""The boot lines: what the parent tells a worker or a frontend as it starts it, as JSON.

Apart from the processes' own modules, so that the parent imports neither torch nor HTTP.
"""

from typing import Any

import msgspec

from core.interfaces.control import Endpoints, ModelFiles
from core.parallel.plan import Plan
from core.settings.config import AppConfig


def worker_name(rank: int) -> str:
    """What the process of a rank is called, by its parent and by the other ranks."""
    return f"worker {rank}"


class WorkerBoot(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank (`core.worker`) needs to know."""

    config: AppConfig
    plan: Plan
    rank: int
    device: str  # as torch names it
    num_threads: int  # of CPU work
    local_ranks: int  # ranks that share this host's memory
    files: ModelFiles
    endpoints: Endpoints


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the frontend tells about the model; see core.interfaces.frontend.ServedModel."""

    name: str
    max_model_len: int
    vocab_size: int
    info: dict[str, Any] = {}


class FrontendBoot(msgspec.Struct, frozen=True, kw_only=True):
    """What a frontend process (`core.serve.process`) needs to know."""

    config: AppConfig
    endpoints: Endpoints
    files: ModelFiles
    served: Served
