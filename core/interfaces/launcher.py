"""Launchers: which ranks this node starts, and what each process needs. Pure data, no torch.

A launcher decides; `core.start` starts the processes and `core.cluster.processes.supervisor`
watches them. So a launcher for a batch system only reads its environment (which node am I, where is
node 0).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.parallel.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDtypes:
    """Which 16-bit dtypes a CPU has instructions to multiply, by name; float32 every CPU has."""

    native: Mapping[str, str]  # dtype -> the instructions
    lacking: Mapping[str, str]  # dtype -> why there are none
    grouped: bool = False  # whether torch has fast products of 4-bit groups for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this node offers; `core.cluster.processes.machine` finds it."""

    device: str  # "cpu" or "cuda"
    num_devices: int  # CUDA devices this process may use; 0 on "cpu"
    device_bytes: int = 0  # memory of the smallest of them
    cpus: tuple[int, ...]  # logical CPUs this process may use
    dtypes: NativeDtypes  # of those CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where this node stands among the nodes of one engine."""

    nnodes: int = 1
    node_rank: int = 0  # node 0 also runs the frontend
    rendezvous: str | None = None  # host:port of node 0; None where there is one node


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One worker process of this node."""

    rank: int  # in the plan
    local_rank: int  # on this node
    device: str  # as torch names it: "cpu", "cuda:0"
    num_threads: int  # of CPU work in this process
    cpus: tuple[int, ...] | None  # it may run on these only; None: anywhere
    env: Mapping[str, str]  # added to the environment it is started with


class Launcher(Protocol):
    """What a launcher plugin's factory returns."""

    def site(self) -> Site:
        """This node's place. Raises ConfigError where the settings or the environment don't
        say it, or contradict each other."""
        ...

    def placements(self, plan: Plan, machine: Machine) -> list[Placement]:
        """This node's workers, by rank. Raises ResourceError where the machine is too small."""
        ...


@runtime_checkable
class RemoteLauncher(Protocol):
    """What a launcher plugin's factory returns instead where this process is no node: it starts
    the nodes elsewhere (each with a `Launcher` of its own) and watches them."""

    def drive(self, words: Sequence[str]) -> int:
        """Run the command line `words` on every node until all have ended; returns the exit
        status. Blocks. Raises NodeweaveError where nodes can't be had."""
        ...
