"""Node 0's side of a group: lets the other nodes in, compares them, and passes on what ends them.

Has a link to every other node. Decides nothing about processes: `core.cluster.processes.supervisor`
does.
"""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from core.cluster.nodes import link_events
from core.cluster.nodes.agreement import report
from core.cluster.nodes.join_check import join_problem
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.nodes.node_messages import (
    Agreed,
    Bye,
    Doing,
    End,
    Facts,
    Join,
    Leave,
    NodeMessage,
    Said,
    Stop,
    WorkersReady,
)
from core.cluster.nodes.strangers import RefusalLog
from core.cluster.processes.group import DrainAsked, Ended, GroupError, GroupEvent, Heard, farewell
from core.cluster.processes.process import heard_text
from core.cluster.processes.watch_clock import WatchClock
from core.errors import ResourceError
from core.interfaces.control import ChildStatus, Ready
from core.interfaces.launcher import Site
from core.settings.address import join_address, split_address
from core.settings.config import ClusterConfig, LaunchConfig

GATHER_S = 1.0  # after a difference was found, for those of further nodes
BYE_S = 6.0  # for the other nodes to end their processes after `stop`
TICK_S = 0.5
LONGEST_GAP_S = 2.0  # between two looks at deadlines, as far as it counts against the others


@dataclass(slots=True)
class _Node:
    """Another node that joined."""

    peer: int
    join: Join
    phase: str = "joined"
    facts: Mapping[str, str] | None = None
    workers_ready: bool = False
    left: bool = False
    last_heard: dict[str, str] = field(default_factory=dict)  # by process
    moved_s: float = field(default_factory=lambda: time.monotonic())  # when it last said something

    @property
    def label(self) -> str:
        return f"node {self.join.node_rank} ({self.join.address}, {self.join.host})"


class Lead:
    """Implements core.cluster.processes.group.Group for node 0."""

    def __init__(
        self,
        site: Site,
        listener: socket.socket,
        links: NodeLinks,
        cluster: ClusterConfig,
        launch: LaunchConfig,
        *,
        wire_key: str,
        note: Callable[[str], None],
        waiting: Callable[[str], None],
    ) -> None:
        """`listener` is bound to node 0's address. `note` shows a line to the user, `waiting` what
        is being waited for (often; the display thins it out)."""
        self.site = site
        self.wire_key = wire_key
        self.fd = links.fd
        self.infos: dict[str, Ready] = {}
        self.address, self._port = listener.getsockname()[:2]
        self._links = links
        self._cluster = cluster
        self._launch = launch
        self._note = note
        self._waiting = waiting
        self._nodes: dict[int, _Node] = {}  # by rank
        self._ranks: dict[int, int] = {}  # by peer
        self._peers: dict[int, str] = {}  # addresses of all links, also before they joined
        # By whether they had a wrong token: scanners of ports must not hide a node set up wrong.
        self._refusals = {False: RefusalLog(), True: RefusalLog()}
        self._agreed = False
        self._ended = False  # everyone was told, one way or the other
        self._stopping = False
        self._start_s = time.monotonic()
        links.listen(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for event in self._links.events():  # nodes that came a moment ago are told too
                self._take(event)
            self._tell_end(farewell(error, 0))
        if self._stopping and not self._ended:
            self._await_byes()
        self._links.close()

    # Before the workers are started.

    def enter(self, phase: str) -> None:
        self._check(self._links.events())

    def progress(self, task: str, done: int, total: int, unit: str) -> None:
        self._check(self._links.events())

    def agree(self, facts: Mapping[str, str]) -> list[str]:
        difference_s: float | None = None  # when the first was found
        clock = WatchClock(longest_gap_s=LONGEST_GAP_S)
        while True:
            self._forgive(clock.tick())
            gathered = self._facts(facts)
            text = report(gathered)
            now = time.monotonic()
            if text is not None:
                difference_s = now if difference_s is None else difference_s
            everyone = len(gathered) == self.site.nnodes
            if text is not None and (everyone or now - (difference_s or now) >= GATHER_S):
                raise GroupError(text)
            if everyone:
                break
            if text is None:
                self._check_deadlines(now)
                self._waiting(self._waiting_text(now))
            self._check(self._links.wait(TICK_S if text is None else GATHER_S / 4))
        self._agreed = True
        addresses = [
            self.address,
            *(self._nodes[rank].join.address for rank in range(1, self.site.nnodes)),
        ]
        self._tell_all(Agreed(addresses))
        now = time.monotonic()
        for node in self._nodes.values():
            node.phase, node.moved_s = "start workers", now
        self._note(
            f"all {self.site.nnodes} nodes are here and agree, {now - self._start_s:.1f} s after "
            "node 0 began to listen"
        )
        return addresses

    # While processes run.

    def events(self) -> list[GroupEvent]:
        found: list[GroupEvent] = []
        for event in self._links.events():
            outcome = self._take(event)
            if outcome is not None:
                found.append(outcome)
        return found

    @property
    def others_ready(self) -> bool:
        return all(node.workers_ready for node in self._nodes.values())

    def said(self, process: str, status: ChildStatus) -> None:
        pass

    def workers_ready(self) -> None:
        pass

    def waiting_for(self) -> Sequence[str]:
        lines = []
        for rank, node in sorted(self._nodes.items()):
            if node.workers_ready:
                continue
            heard = [
                f"{process} on node {rank}: last heard: {text}"
                for process, text in sorted(node.last_heard.items())
                if process not in self.infos
            ]
            lines += heard or [f"node {rank}: no worker said anything yet"]
        return lines

    def failed(self, text: str, brief: str, exit_code: int) -> None:
        self._tell_end(Ended(text, brief, exit_code))

    def ask_to_drain(self, signal: str) -> bool:
        return False

    def stop(self) -> None:
        self._stopping = True
        self._tell_all(Stop())

    # Events.

    def _check(self, events: Sequence[link_events.Event]) -> None:
        for event in events:
            outcome = self._take(event)
            if isinstance(outcome, Ended):
                raise GroupError(outcome.text, outcome.exit_code)

    def _take(self, event: link_events.Event) -> GroupEvent | None:
        """Take in one event; what it means for this node's processes, if anything."""
        match event:
            case link_events.Arrived(peer, address):
                self._peers[peer] = address
            case link_events.Turned():
                self._show_turned(event)
            case link_events.TurnedMore(number):
                self._refusals[False].count(number)
            case link_events.Received(peer, Join() as join):
                return self._on_join(peer, join)
            case link_events.Received(peer, message):
                if peer in self._ranks:
                    return self._on_message(self._nodes[self._ranks[peer]], message)
            case link_events.Lost():
                return self._on_lost(event)
            case link_events.Broken(reason):
                text = f"node 0: {reason}; the engine ends"
                return self._end(Ended(text, "node 0 failed", 1), None)
        return None

    def _on_message(self, node: _Node, message: NodeMessage) -> GroupEvent | None:
        node.moved_s = time.monotonic()
        match message:
            case Doing(phase):
                node.phase = phase
            case Facts(values):
                node.facts = values
                node.phase = "compare"
            case Said(process, status):
                node.last_heard[process] = heard_text(status)
                if isinstance(status, Ready):
                    self.infos[process] = status
                return Heard(process, status)
            case WorkersReady():
                node.workers_ready = True
            case Leave(signal):
                return DrainAsked(f"{node.label} got {signal}")
            case Bye():
                node.left = True
            case End(text, brief, exit_code):
                return self._end(Ended(text, brief, exit_code), node.peer)
            case _:
                return self._end(_unexpected(node, message), node.peer)
        return None

    def _on_join(self, peer: int, join: Join) -> GroupEvent | None:
        known = self._nodes.get(join.node_rank)
        problem = join_problem(
            join,
            self._peers[peer],
            nnodes=self.site.nnodes,
            known=None if known is None else (known.join, self._peers[known.peer]),
        )
        if problem is None:
            self._nodes[join.node_rank] = _Node(peer, join)
            self._ranks[peer] = join.node_rank
            return None
        if not self._agreed:  # the start can't succeed any more: say so at once, everywhere
            return self._end(Ended(problem, "the nodes did not come together", 2), None)
        self._note(f"refused: {problem}")
        self._links.send(peer, End(problem, "refused", 2))
        self._links.drop(peer)
        return None

    def _on_lost(self, event: link_events.Lost) -> GroupEvent | None:
        self._peers.pop(event.peer, None)
        node = self._nodes.get(self._ranks.get(event.peer, 0))
        if node is None or node.left or self._stopping:
            return None
        link = f"the link from node 0 ({self.address}) to {node.label}"
        if event.silent:
            text = (
                f"{link} is dead: {event.reason} (cluster.heartbeat_timeout_s); it was cut, or "
                "that machine stopped; the engine ends"
            )
        else:
            text = f"{node.label} is gone: {event.reason}; {link} ended; the engine ends"
        brief = f"node {node.join.node_rank} is gone"
        return self._end(Ended(text, brief, 1), event.peer)

    def _end(self, ended: Ended, source: int | None) -> GroupEvent | None:
        if self._ended:
            return None
        self._tell_end(ended, source)
        return ended

    def _tell_end(self, ended: Ended, source: int | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        for peer in self._peers:
            if peer != source:
                self._links.send(peer, End(ended.text, ended.brief, ended.exit_code))

    def _tell_all(self, message: NodeMessage) -> None:
        for node in self._nodes.values():
            self._links.send(node.peer, message)

    def _show_turned(self, event: link_events.Turned) -> None:
        host = split_address(event.address)[0] if event.address[-1:].isdigit() else event.address
        advice = "; give every node the same token" if event.wrong_token else ""
        text = f"error: {event.address} came to join and was refused: {event.reason}{advice}"
        line = self._refusals[event.wrong_token].line(host, event.reason, text)
        if line is not None:
            self._note(line)

    # Deadlines.

    def _facts(self, own: Mapping[str, str]) -> dict[int, Mapping[str, str]]:
        found = {rank: node.facts for rank, node in self._nodes.items() if node.facts is not None}
        return {0: own, **dict(sorted(found.items()))}

    def _absent(self) -> list[int]:
        return [rank for rank in range(1, self.site.nnodes) if rank not in self._nodes]

    def _forgive(self, seconds: float) -> None:
        """So long this process did not run: that counts against nobody."""
        self._start_s += seconds
        for node in self._nodes.values():
            node.moved_s += seconds

    def _check_deadlines(self, now: float) -> None:
        """Raise GroupError where a node took too long to come, or to find its files."""
        absent = self._absent()
        if absent and now - self._start_s >= self._cluster.join_timeout_s:
            raise GroupError(
                f"{_names(absent)} of {self.site.nnodes} did not join within "
                f"{self._cluster.join_timeout_s:g} s (cluster.join_timeout_s) at "
                f"{join_address(self.address, self._port)}; look at the output there",
                ResourceError.exit_code,
            )
        for node in self._nodes.values():
            limit_s = self._launch.startup_timeout_s
            if node.facts is None and now - node.moved_s >= limit_s:
                raise GroupError(
                    f"{node.label} made no progress for {limit_s:g} s "
                    f"(launch.startup_timeout_s) in the phase '{node.phase}'",
                    ResourceError.exit_code,
                )

    def _waiting_text(self, now: float) -> str:
        absent = self._absent()
        parts = []
        if absent:
            limit_s = self._cluster.join_timeout_s
            parts.append(
                f"{_names(absent)} to join at {join_address(self.address, self._port)} "
                f"({now - self._start_s:.0f} of {limit_s:g} s)"
            )
        for rank, node in sorted(self._nodes.items()):
            if node.facts is None:
                heard = "".join(f", {text}" for text in node.last_heard.values())
                parts.append(f"node {rank} in the phase '{node.phase}'{heard}")
        return f"waiting for {'; '.join(parts)}"

    def _await_byes(self) -> None:
        """Let the other nodes end their processes before the links close."""
        deadline = time.monotonic() + BYE_S
        while time.monotonic() < deadline:
            left = [n for n in self._nodes.values() if not n.left and n.peer in self._peers]
            if not left:
                return
            for event in self._links.wait(deadline - time.monotonic()):
                self._take(event)
        self._note("error: not every node said that it ended its processes")


def _unexpected(node: _Node, message: NodeMessage) -> Ended:
    text = f"{node.label} sent {type(message).__name__}, which nobody expects from it"
    return Ended(text, "the nodes misunderstood each other", 1)


def _names(ranks: list[int]) -> str:
    return f"{'node' if len(ranks) == 1 else 'nodes'} {', '.join(map(str, ranks))}"
