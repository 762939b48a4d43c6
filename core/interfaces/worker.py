"""Which rank a worker process is, for plugins that run beside it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One rank of the engine; each has a process of its own."""

    rank: int  # over all nodes, from 0
    world_size: int  # ranks of the engine
    dp_rank: int  # of its attention group, which has requests of its own
    local_ranks: int  # on this host
    device: str  # as torch names it: "cpu", "cuda:0"
