"""Node 0 and other nodes in one process."""

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from core.cluster.nodes.lead import Lead
from core.cluster.nodes.member import Member, reach
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.processes.group import GroupEvent
from core.errors import NodeweaveError
from core.interfaces.launcher import Site
from core.settings.config import ClusterConfig, LaunchConfig

KEY = b"k" * 32
FACTS = {"config a": "1"}
LIMIT_S = 10.0


class Cluster:
    """Node 0, and members as they are added. Everyone's `agree` runs in a thread."""

    def __init__(self, nnodes: int, *, timeout_s: float = 5.0, **cluster: Any) -> None:
        self.nnodes = nnodes
        self.timeout_s = timeout_s
        self.notes: list[str] = []
        self.waiting: list[str] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.lead = Lead(
            Site(nnodes=nnodes, node_rank=0),
            listener,
            self._links(),
            ClusterConfig(**cluster),
            LaunchConfig(startup_timeout_s=cluster.get("join_timeout_s", 60.0)),
            wire_key="",
            note=self.notes.append,
            waiting=self.waiting.append,
        )
        self.members: list[Member] = []
        self._threads = ThreadPoolExecutor(8)

    def _links(self) -> NodeLinks:
        return NodeLinks(interval_s=0.05, timeout_s=self.timeout_s, key=KEY)

    def join(self, node_rank: int, nnodes: int | None = None) -> Member:
        site = Site(nnodes=nnodes or self.nnodes, node_rank=node_rank)
        link = reach("127.0.0.1", self.port, KEY, LIMIT_S, lambda text: None)
        self.members.append(Member(site, self._links(), link, wire_key=""))
        return self.members[-1]

    def agree(self, node: Lead | Member, facts: dict[str, str] = FACTS) -> Future[list[str]]:
        return self._threads.submit(node.agree, facts)

    def agreed(self) -> None:
        """All members join, and all agree."""
        for node_rank in range(1, self.nnodes):
            self.join(node_rank)
        outcomes = [self.agree(node) for node in (self.lead, *self.members)]
        for outcome in outcomes:
            assert outcome.result(LIMIT_S) == ["127.0.0.1"] * self.nnodes

    def close(self) -> None:
        for node in (*self.members, self.lead):
            node._links.close(0.0)
        self._threads.shutdown()


def next_event(node: Lead | Member) -> GroupEvent:
    deadline = time.monotonic() + LIMIT_S
    while not (events := node.events()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(events) == 1, events
    return events[0]


def error_of(outcome: Future[list[str]]) -> NodeweaveError:
    error = outcome.exception(LIMIT_S)
    assert isinstance(error, NodeweaveError)
    return error
