"""What a node's start and its supervisor see of the other nodes, and the group of one node.

`core.cluster.nodes.lead` is node 0's side of a group, `core.cluster.nodes.member` that of the
others. Knows nothing of sockets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from core.errors import NodeweaveError
from core.interfaces.control import ChildStatus, Ready
from core.interfaces.launcher import Site


@dataclass(frozen=True, slots=True)
class Heard:
    """A process of another node said something."""

    process: str
    status: ChildStatus


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine ends because of an error on another node, or of a link. Every node knows it."""

    text: str  # for people
    brief: str  # one line that may be shown to clients
    exit_code: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """Node 0 wants every node to end, with status 0."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Another node was asked to end: finish what runs, then stop everyone. Node 0 only."""

    by: str


GroupEvent = Heard | Ended | Stopped | DrainAsked


class GroupError(NodeweaveError):
    """The start ended because of another node, or because the nodes don't fit each other."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Group(Protocol):
    """The nodes of an engine, from one of them. A context manager: whatever ends it, the other
    nodes are told."""

    site: Site
    address: str  # this node's, as the others reach it; "" on one node
    wire_key: str  # of the workers' sockets between nodes, see Endpoints.key; "" on one node

    @property
    def fd(self) -> int | None:
        """Readable when `events` has something; None: never."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    # Before the workers are started. Each raises GroupError once the group ended.

    def enter(self, phase: str) -> None:
        """This node does something new."""
        ...

    def progress(self, task: str, done: int, total: int, unit: str) -> None:
        """This node is so far; call it often in long work, as it also finds out about the end."""
        ...

    def agree(self, facts: Mapping[str, str]) -> list[str]:
        """Wait until every node gave its facts and they agree; the nodes' addresses, by rank."""
        ...

    # While processes run. None of these blocks.

    def events(self) -> list[GroupEvent]: ...

    @property
    def others_ready(self) -> bool:
        """Whether all workers of the nodes this one waits for (node 0: all) are ready."""
        ...

    @property
    def infos(self) -> Mapping[str, Ready]:
        """What the workers of other nodes said when they were ready, by name."""
        ...

    def said(self, process: str, status: ChildStatus) -> None:
        """A process of this node said something."""
        ...

    def workers_ready(self) -> None:
        """Every worker of this node is ready."""
        ...

    def waiting_for(self) -> Sequence[str]:
        """What other nodes are not ready with, a line each."""
        ...

    def failed(self, text: str, brief: str, exit_code: int) -> None:
        """Something failed on this node: end everyone."""
        ...

    def ask_to_drain(self, signal: str) -> bool:
        """This node was asked to end. True: wait for `Stopped`. False: drain, then call `stop`."""
        ...

    def stop(self) -> None:
        """Have every node end with status 0."""
        ...


class SingleNode:
    """The group of one node."""

    fd = None
    address = ""
    wire_key = ""
    others_ready = True

    def __init__(self) -> None:
        self.site = Site()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def enter(self, phase: str) -> None:
        pass

    def progress(self, task: str, done: int, total: int, unit: str) -> None:
        pass

    def agree(self, facts: Mapping[str, str]) -> list[str]:
        return []

    def events(self) -> list[GroupEvent]:
        return []

    @property
    def infos(self) -> Mapping[str, Ready]:
        return {}

    def said(self, process: str, status: ChildStatus) -> None:
        pass

    def workers_ready(self) -> None:
        pass

    def waiting_for(self) -> Sequence[str]:
        return ()

    def failed(self, text: str, brief: str, exit_code: int) -> None:
        pass

    def ask_to_drain(self, signal: str) -> bool:
        return False

    def stop(self) -> None:
        pass


def farewell(error: BaseException, node_rank: int) -> Ended:
    """What the other nodes are told about an error that ends this one's start."""
    node = f"node {node_rank}"
    if isinstance(error, GroupError):
        text = str(error)  # speaks of nodes already
    elif isinstance(error, NodeweaveError):
        text = f"{node}: {error}"
    elif isinstance(error, KeyboardInterrupt):
        return Ended(f"{node} was interrupted", f"{node} was interrupted", 130)
    else:
        text = f"{node} failed: {type(error).__name__}: {error}; its own output says more"
    exit_code = error.exit_code if isinstance(error, NodeweaveError) else 1
    return Ended(text, f"{node} failed: {type(error).__name__}", exit_code)
