"""The side of a group of every node but node 0: one link, to node 0, which decides.

Decides nothing about processes: `core.cluster.processes.supervisor` does.
"""

import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from core.cluster.nodes import link_events
from core.cluster.nodes.link import Link, LinkClosed, LinkError, WrongToken
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
from core.cluster.nodes.strangers import HANDSHAKE_S
from core.cluster.processes.group import Ended, GroupError, GroupEvent, Stopped, farewell
from core.cluster.processes.watch_clock import WatchClock
from core.errors import ConfigError, ResourceError
from core.interfaces.control import ChildStatus, Failed, Heartbeat, LinesDropped, Progress, Ready
from core.interfaces.launcher import Site
from core.settings.address import join_address

RETRY_S = 0.25  # between two attempts to reach node 0
CONNECT_S = 2.0  # for one attempt
PROGRESS_S = 0.2  # between two reports of this node's own progress
TICK_S = 0.5


class Member:
    """Implements core.cluster.processes.group.Group."""

    def __init__(self, site: Site, links: NodeLinks, link: Link, *, wire_key: str) -> None:
        """Join over an established link, which `links` takes over."""
        self.site = site
        self.wire_key = wire_key
        self.fd = links.fd
        self.others_ready = True  # only node 0 waits for others
        self.infos: Mapping[str, Ready] = {}
        self.address = link.own_address
        self._lead_address = link.peer
        self._links = links
        self._ended = False
        self._stopped = False
        self._next_progress_s = 0.0
        self._addresses: list[str] | None = None
        self._peer = links.adopt(link)
        self._send(
            Join(site.node_rank, site.nnodes, self.address, socket.gethostname(), os.getpid())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._ended:
            last = farewell(error, self.site.node_rank)
            self.failed(last.text, last.brief, last.exit_code)
        elif self._stopped:
            self._send(Bye())
        self._links.close()

    # Before the workers are started.

    def enter(self, phase: str) -> None:
        self._send(Doing(phase))
        self._check(self._links.events())

    def progress(self, task: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if now >= self._next_progress_s:
            self._next_progress_s = now + PROGRESS_S
            self.said(f"node {self.site.node_rank}", Progress(task, done, total, unit))
        self._check(self._links.events())

    def agree(self, facts: Mapping[str, str]) -> list[str]:
        self._send(Facts(dict(facts)))
        while self._addresses is None:  # node 0 keeps the deadlines, and its heart is heard
            self._check(self._links.wait(TICK_S))
        return self._addresses

    # While processes run.

    def events(self) -> list[GroupEvent]:
        found: list[GroupEvent] = []
        for event in self._links.events():
            outcome = self._take(event)
            if outcome is not None:
                found.append(outcome)
        return found

    def said(self, process: str, status: ChildStatus) -> None:
        if not isinstance(status, Heartbeat | Failed | LinesDropped):  # these are judged here
            self._send(Said(process, status))

    def workers_ready(self) -> None:
        self._send(WorkersReady())

    def waiting_for(self) -> Sequence[str]:
        return ()

    def failed(self, text: str, brief: str, exit_code: int) -> None:
        if not self._ended:
            self._ended = True
            self._send(End(text, brief, exit_code))

    def ask_to_drain(self, signal: str) -> bool:
        self._send(Leave(signal))
        return True

    def stop(self) -> None:
        raise AssertionError("only node 0 stops the others")

    # Events.

    def _send(self, message: NodeMessage) -> None:
        self._links.send(self._peer, message)

    def _check(self, events: Sequence[link_events.Event]) -> None:
        for event in events:
            outcome = self._take(event)
            if isinstance(outcome, Ended):
                raise GroupError(outcome.text, outcome.exit_code)

    def _take(self, event: link_events.Event) -> GroupEvent | None:
        if self._ended or self._stopped:
            return None
        match event:
            case link_events.Received(_, Agreed(addresses)):
                self._addresses = addresses
            case link_events.Received(_, Stop()):
                self._stopped = True
                return Stopped()
            case link_events.Received(_, End(text, brief, exit_code)):
                self._ended = True
                return Ended(text, brief, exit_code)
            case link_events.Lost(_, reason, silent):
                self._ended = True
                return Ended(self._lost_text(reason, silent), "node 0 is gone", 1)
            case link_events.Broken(reason):
                self._ended = True
                text = f"node {self.site.node_rank}: {reason}; the engine ends"
                return Ended(text, f"node {self.site.node_rank} failed", 1)
        return None

    def _lost_text(self, reason: str, silent: bool) -> str:
        link = f"the link from node {self.site.node_rank} ({self.address}) to node 0"
        if silent:
            return (
                f"{link} ({self._lead_address}) is dead: {reason} (cluster.heartbeat_timeout_s); "
                "it was cut, or that machine stopped; the engine ends"
            )
        return f"node 0 ({self._lead_address}) is gone: {reason}; {link} ended; the engine ends"


def reach(
    host: str, port: int, key: bytes, timeout_s: float, waiting: Callable[[str], None]
) -> Link:
    """An established link to node 0, tried again until it is there.

    Raises ConfigError where it has another token, ResourceError where something else answers or
    nothing does within `timeout_s`, in which this process ran.
    """
    where = f"node 0 at {join_address(host, port)}"
    clock = WatchClock(longest_gap_s=CONNECT_S + HANDSHAKE_S + 1.0)
    while True:
        try:
            return _connect(host, port, key)
        except WrongToken as error:
            raise ConfigError(
                f"{where} has another cluster token than this node; give every node the same "
                "(cluster.token_file or NODEWEAVE_CLUSTER_TOKEN)"
            ) from error
        except (LinkClosed, OSError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        except LinkError as error:
            raise ResourceError(f"{where}: what answers there is not it: {error}") from error
        clock.tick()
        passed_s = clock.now_s
        if passed_s >= timeout_s:
            raise ResourceError(
                f"{where} could not be reached for {timeout_s:g} s (cluster.join_timeout_s): "
                f"{reason}; is it started there, and does a firewall let this port pass?"
            )
        waiting(f"waiting for {where} ({reason}; {passed_s:.0f} of {timeout_s:g} s)")
        time.sleep(RETRY_S)


def _connect(host: str, port: int, key: bytes) -> Link:
    """One attempt, handshake included. Raises LinkError or OSError, whatever answers there."""
    connected = socket.create_connection((host, port), CONNECT_S)
    try:
        link = Link(connected, key, serves=False)
        _shake_hands(link)
    except (LinkError, OSError):
        connected.close()
        raise
    except Exception as error:
        connected.close()
        raise LinkError(f"it caused {type(error).__name__}: {error}") from error
    except BaseException:
        connected.close()
        raise
    return link


def _shake_hands(link: Link) -> None:
    """Until both sides proved themselves. What follows is for whoever reads the link then."""
    deadline = time.monotonic() + HANDSHAKE_S
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while not link.established:
            waiting = link.flush()
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waiting else 0)
            selector.modify(link, events)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise LinkError(f"it did not prove itself within {HANDSHAKE_S:g} s")
            if selector.select(left_s):
                link.read()
