"""The boot line of a worker process; apart from `core.worker` so that its parent can write it."""

import msgspec

from core.config import AppConfig
from core.interfaces.control import Endpoints, ModelFiles
from core.parallel.plan import Plan


class WorkerBoot(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank needs to know."""

    config: AppConfig
    plan: Plan
    rank: int
    device: str  # as torch names it
    num_threads: int  # of CPU work
    local_ranks: int  # ranks that share this host's memory
    files: ModelFiles
    endpoints: Endpoints
    rendezvous: str  # of the process groups, see core.parallel.mesh
