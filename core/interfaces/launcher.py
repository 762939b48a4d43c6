"""Launchers: which ranks this node starts, and what each process needs. Plain data, no torch.

A launcher only decides. `core.start` starts the processes, and
`core.cluster.processes.supervisor` watches them. So a launcher for a batch system only reads its
environment: which node is this, and where is node 0?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.parallel.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDtypes:
    """The 16-bit dtypes that a CPU has instructions to multiply. Every CPU has them for float32."""

    native: Mapping[str, str]  # dtype -> the instructions
    lacking: Mapping[str, str]  # dtype -> why there are none
    grouped: bool = False  # whether torch has fast products of 4-bit groups for this CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The hardware of this node, found by `core.cluster.processes.machine`."""

    device: str  # "cpu" or "cuda"
    num_devices: int  # CUDA devices that this process may use; 0 on "cpu"
    device_bytes: int = 0  # memory of the smallest of them
    cpus: tuple[int, ...]  # logical CPUs that this process may use
    dtypes: NativeDtypes  # of those CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The position of this node among the nodes of one engine."""

    nnodes: int = 1
    node_rank: int = 0  # node 0 also runs the frontend
    rendezvous: str | None = None  # host:port of node 0; None with one node


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One worker process of this node."""

    rank: int  # in the plan
    local_rank: int  # on this node
    device: str  # name in torch: "cpu", "cuda:0"
    num_threads: int  # of CPU work in this process
    cpus: tuple[int, ...] | None  # it runs only on these; None: on any
    env: Mapping[str, str]  # added to its environment


class Launcher(Protocol):
    """What the factory of a launcher plugin returns."""

    def site(self) -> Site:
        """Return the position of this node.

        Raises ConfigError if settings and environment do not tell it, or contradict each other."""
        ...

    def placements(self, plan: Plan, machine: Machine) -> list[Placement]:
        """Return this node's workers, by rank. Raises ResourceError if the machine is too small."""
        ...


@runtime_checkable
class RemoteLauncher(Protocol):
    """What the factory of a launcher plugin returns if this process is not a node.

    It starts the nodes elsewhere, each with its own `Launcher`, and watches them."""

    def drive(self, words: Sequence[str]) -> int:
        """Run the command line `words` on every node, and wait until all have ended (blocks).

        Returns the exit status. Raises NodeweaveError if there are not enough nodes."""
        ...
