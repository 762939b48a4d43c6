"""Node 0 and other nodes in one process: how they meet, agree, and end together."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest

from core.cluster.nodes import lead as lead_module
from core.cluster.nodes.exchange import Exchange
from core.cluster.nodes.lead import Lead
from core.cluster.nodes.link_events import Broken, Turned
from core.cluster.nodes.member import Member, reach
from core.cluster.nodes.rendezvous import meet
from core.cluster.nodes.secret import TOKEN_VARIABLE
from core.cluster.processes.display import Display
from core.cluster.processes.group import (
    DrainAsked,
    Ended,
    GroupError,
    GroupEvent,
    Heard,
    SingleNode,
    Stopped,
)
from core.errors import ConfigError, NodeweaveError, ResourceError
from core.interfaces.control import Failed, Heartbeat, Ready, StartPhase
from core.interfaces.launcher import Site
from core.settings.config import AppConfig, ClusterConfig, LaunchConfig, ModelConfig

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
            self._exchange(),
            ClusterConfig(**cluster),
            LaunchConfig(startup_timeout_s=cluster.get("join_timeout_s", 60.0)),
            wire_key="",
            note=self.notes.append,
            waiting=self.waiting.append,
        )
        self.members: list[Member] = []
        self._threads = ThreadPoolExecutor(8)

    def _exchange(self) -> Exchange:
        return Exchange(interval_s=0.05, timeout_s=self.timeout_s, key=KEY)

    def join(self, node_rank: int, nnodes: int | None = None) -> Member:
        site = Site(nnodes=nnodes or self.nnodes, node_rank=node_rank)
        link = reach("127.0.0.1", self.port, KEY, LIMIT_S, lambda text: None)
        self.members.append(Member(site, self._exchange(), link, wire_key=""))
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
            node._exchange.close(0.0)
        self._threads.shutdown()


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    made = []

    def make(nnodes: int = 2, **settings: Any) -> Cluster:
        made.append(Cluster(nnodes, **settings))
        return made[-1]

    yield make
    for found in made:
        found.close()


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


# Coming together.


def test_three_nodes_meet_and_learn_each_other_s_addresses(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(3)
    made.agreed()
    assert made.notes[-1].startswith("all 3 nodes are here and agree")


def test_every_difference_is_told_to_everyone(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    facts = [{"config a": "1", "package torch": "2.13"}] * 3
    facts[2] = {"config a": "2", "package torch": "2.12"}
    outcomes = [made.agree(made.lead, facts[0])]
    outcomes += [made.agree(made.join(rank), facts[rank]) for rank in (1, 2)]
    error = error_of(outcomes[0])
    made.lead.__exit__(type(error), error, None)
    for outcome in outcomes:
        text = str(error_of(outcome))
        assert "a: nodes 0, 1 have 1; node 2 has 2" in text
        assert "package torch: nodes 0, 1 have 2.13; node 2 has 2.12" in text
        assert error_of(outcome).exit_code == 2


def test_a_difference_does_not_wait_for_nodes_that_are_missing(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(3)
    outcome = made.agree(made.lead)
    made.agree(made.join(1), {"config a": "2"})
    assert "a: node 0 has 1; node 1 has 2" in str(error_of(outcome))


def test_a_node_rank_given_twice_ends_the_start(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    outcomes = [made.agree(made.lead)]
    outcomes += [made.agree(made.join(1)) for _ in range(2)]
    for outcome in outcomes:
        text = str(error_of(outcome))
        assert text.startswith("launch.node_rank=1 was given to two nodes: 127.0.0.1:")
        assert "give each node its own, 0 to 2" in text


@pytest.mark.parametrize(
    ("node_rank", "nnodes", "fragment"),
    [
        (1, 3, "has launch.nnodes=3, node 0 has launch.nnodes=2"),
        (2, 2, "has launch.node_rank=2; allowed for launch.nnodes=2 are 0 (this node) and 1 to 1"),
        (0, 2, "has launch.node_rank=0; allowed"),
    ],
)
def test_a_node_that_does_not_fit(
    cluster: Callable[..., Cluster], node_rank: int, nnodes: int, fragment: str
) -> None:
    made = cluster(2)
    outcomes = [made.agree(made.lead), made.agree(made.join(node_rank, nnodes))]
    for outcome in outcomes:
        assert fragment in str(error_of(outcome))


def test_a_stranger_with_the_token_does_not_disturb_a_running_engine(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(2)
    made.agreed()
    late = made.join(1)
    event = None
    while event is None:  # the lead answers from its own loop
        assert made.lead.events() == []
        events = late.events()
        event = events[0] if events else None
    assert isinstance(event, Ended)
    assert "launch.node_rank=1 was given to two nodes" in event.text
    made.members[0].workers_ready()
    while not made.lead.others_ready:
        assert made.lead.events() == []
    assert made.members[0].events() == []


def test_missing_nodes_are_named_at_the_deadline(cluster: Callable[..., Cluster]) -> None:
    made = cluster(4, join_timeout_s=1.0)
    begin_s = time.monotonic()
    outcome = made.agree(made.lead)
    made.agree(made.join(2))
    text = str(error_of(outcome))
    assert time.monotonic() - begin_s >= 0.9
    assert text.startswith("nodes 1, 3 of 4 did not join within 1 s (cluster.join_timeout_s) at ")
    assert any("nodes 1, 3 to join at 127.0.0.1:" in line for line in made.waiting)


class Pauses:
    """Called where a node says that it waits: the first time, everything stands still for long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paused = Event()
        self.told: SimpleQueue[str] = SimpleQueue()
        running_s = time.monotonic
        begin_s = running_s()
        monkeypatch.setattr(
            time, "monotonic", lambda: running_s() + (10_000.0 if self.paused.is_set() else 0.0)
        )
        assert time.monotonic() - begin_s < 10_000.0

    def __call__(self, text: str) -> None:
        self.paused.set()
        self.told.put(text)


def test_time_in_which_node_0_was_paused_counts_against_nobody(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cluster(2, join_timeout_s=60.0)
    pauses = made.lead._waiting = Pauses(monkeypatch)
    outcome = made.agree(made.lead)
    assert pauses.paused.wait(LIMIT_S)
    made.agree(made.join(1))
    assert outcome.result(LIMIT_S) == ["127.0.0.1"] * 2


def test_time_in_which_a_node_was_paused_does_not_end_its_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pauses = Pauses(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(reach, "127.0.0.1", port, KEY, 60.0, pauses)
        for _ in range(2):  # once before, once after it
            assert "refused" in pauses.told.get(timeout=LIMIT_S)
        exchange = Exchange(interval_s=1, timeout_s=10, key=KEY)
        exchange.listen(socket.create_server(("127.0.0.1", port)))
        outcome.result(LIMIT_S).close()
        exchange.close()


def test_a_node_that_gets_stuck_is_named_with_its_phase(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2, join_timeout_s=1.0)
    made.join(1).enter("find the model's files")
    text = str(error_of(made.agree(made.lead)))
    assert "node 1 (127.0.0.1, " in text
    assert "made no progress for 1 s" in text
    assert "in the phase 'find the model's files'" in text
    assert any("node 1 in the phase 'find the model's files'" in line for line in made.waiting)


def test_an_error_before_the_workers_reaches_everyone(cluster: Callable[..., Cluster]) -> None:
    """Of a member, while it looks for its files."""
    made = cluster(3)
    outcomes = [made.agree(made.lead), made.agree(made.join(1))]
    failing = made.join(2)
    with pytest.raises(ResourceError), failing:
        raise ResourceError("no space left")
    lead_error = error_of(outcomes[0])
    made.lead.__exit__(type(lead_error), lead_error, None)
    for outcome in outcomes:
        assert str(error_of(outcome)) == "node 2: no space left"


def test_node_0_s_error_reaches_the_others(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    outcome = made.agree(made.join(1))
    while not made.lead._nodes:
        made.lead.enter("find the model's files")
    with pytest.raises(ResourceError), made.lead:
        raise ResourceError("no space left")
    assert str(error_of(outcome)) == "node 0: no space left"


def test_long_work_finds_out_that_the_group_ended(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    member = made.join(1)
    made.lead.__exit__(GroupError, GroupError("node 0 is out of order"), None)

    def work() -> None:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            member.progress("verify weights", 1, 2, "B")

    with pytest.raises(GroupError, match="node 0 is out of order"):
        work()


# Another token, another service, nobody.


def test_another_token_is_named_on_both_sides(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    with pytest.raises(ConfigError, match=r"node 0 at 127\.0\.0\.1:\d+ has another cluster token"):
        reach("127.0.0.1", made.port, b"o" * 32, LIMIT_S, lambda text: None)
    deadline = time.monotonic() + LIMIT_S
    while not made.notes:
        assert time.monotonic() < deadline
        made.lead.enter("find the model's files")
    assert "came to join and was refused: it has another cluster token" in made.notes[0]
    assert made.notes[0].startswith("error: 127.0.0.1:")


def test_something_else_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                connection.recv(100)

        threads.submit(serve)
        with pytest.raises(ResourceError, match="what answers there is not it"):
            reach("127.0.0.1", listener.getsockname()[1], KEY, LIMIT_S, lambda text: None)


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    waiting: list[str] = []
    with pytest.raises(ResourceError, match=r"could not be reached for 1 s.*Connection refused"):
        reach("127.0.0.1", port, KEY, 1.0, waiting.append)
    assert f"waiting for node 0 at 127.0.0.1:{port} (Connection refused; 0 of 1 s)" in waiting


def test_a_node_that_comes_first_waits(cluster: Callable[..., Cluster]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with ThreadPoolExecutor(1) as threads:
        told: SimpleQueue[str] = SimpleQueue()
        outcome = threads.submit(reach, "127.0.0.1", port, KEY, LIMIT_S, told.put)
        assert "refused" in told.get(timeout=LIMIT_S)
        exchange = Exchange(interval_s=1, timeout_s=10, key=KEY)
        exchange.listen(socket.create_server(("127.0.0.1", port)))
        outcome.result(LIMIT_S).close()
        exchange.close()


# While processes run.


def test_statuses_and_readiness_reach_node_0(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    made.agreed()
    one, two = made.members
    assert not made.lead.others_ready
    assert made.lead.waiting_for() == [
        "node 1: no worker said anything yet",
        "node 2: no worker said anything yet",
    ]
    one.said("worker 1", Failed("internal", "x"))  # judged on its node
    one.said("worker 1", Heartbeat(1, 1))
    one.said("worker 1", StartPhase("import", 1.5))
    assert next_event(made.lead) == Heard("worker 1", StartPhase("import", 1.5))
    assert made.lead.waiting_for()[0] == (
        "worker 1 on node 1: last heard: 'import' ended after 1.5 s"
    )
    one.said("worker 1", Ready({"kv_cache_tokens": 1}))
    next_event(made.lead)
    one.workers_ready()
    two.workers_ready()
    deadline = time.monotonic() + LIMIT_S
    while not made.lead.others_ready:
        assert made.lead.events() == []
        assert time.monotonic() < deadline
    assert made.lead.waiting_for() == []
    assert made.lead.infos == {"worker 1": Ready({"kv_cache_tokens": 1})}


def test_a_failure_on_one_node_is_everyone_s(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    made.agreed()
    one, two = made.members
    one.failed("worker 1 died", "died", 1)
    expected = Ended("worker 1 died", "died", 1)
    assert next_event(made.lead) == expected
    assert next_event(two) == expected
    assert one.events() == []


def test_a_failure_of_node_0_is_everyone_s(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    made.agreed()
    made.lead.failed("worker 0 died", "died", 1)
    for member in made.members:
        assert next_event(member) == Ended("worker 0 died", "died", 1)


def test_a_node_that_is_gone_is_named(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3)
    made.agreed()
    one, two = made.members
    one._exchange.close()
    event = next_event(made.lead)
    assert isinstance(event, Ended)
    assert event.text.startswith("node 1 (127.0.0.1, ")
    assert "is gone: the other side closed the connection" in event.text
    assert (event.brief, event.exit_code) == ("node 1 is gone", 1)
    assert next_event(two) == event


def test_node_0_gone_is_named(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    made.agreed()
    made.lead._exchange.close()
    event = next_event(made.members[0])
    assert isinstance(event, Ended)
    assert event.text.startswith("node 0 (127.0.0.1:")


def test_silence_names_the_link_on_both_sides(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both threads live, and neither hears the other's heartbeats."""
    made = cluster(2, timeout_s=0.5)
    made.agreed()

    def say_nothing(exchange: Exchange) -> None:
        exchange._next_beat_s = time.monotonic() + 0.05

    monkeypatch.setattr(Exchange, "_beat", say_nothing)
    sides = {0: next_event(made.lead), 1: next_event(made.members[0])}
    for node_rank, event in sides.items():
        assert isinstance(event, Ended)
        assert f"the link from node {node_rank} (127.0.0.1) to node" in event.text
        # The side that noticed first may have told the other by closing the connection.
        assert "dead: nothing was heard for 0.5 s" in event.text or "is gone" in event.text
        assert event.exit_code == 1
    assert any("dead: nothing was heard" in event.text for event in sides.values())


def test_a_node_whose_links_broke_ends_the_engine(cluster: Callable[..., Cluster]) -> None:
    """Node 0 with nobody to hear of it as well: it must not wait for ever."""
    made = cluster(2)
    made.lead._exchange._say(Broken("this node's links failed"))
    with pytest.raises(GroupError, match="node 0: this node's links failed; the engine ends"):
        made.agree(made.lead).result(LIMIT_S)
    member = made.join(1)
    member._exchange._say(Broken("this node's links failed"))
    with pytest.raises(GroupError, match="node 1: this node's links failed; the engine ends"):
        made.agree(member).result(LIMIT_S)


def test_strangers_get_few_lines(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    made.agreed()
    for number in range(100):
        made.lead._take(Turned(f"10.0.0.{number}:1", f"reason {number}", False))
    made.lead._take(Turned("10.0.1.1:1", "it has another cluster token", True))
    *strangers, wrong = [note for note in made.notes if "was refused" in note]
    assert len(strangers) < 10
    assert wrong.startswith("error: 10.0.1.1:1 came to join and was refused: it has another")


def test_an_orderly_end(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    made.agreed()
    (member,) = made.members
    assert member.ask_to_drain("SIGTERM")
    event = next_event(made.lead)
    assert isinstance(event, DrainAsked)
    assert event.by.startswith("node 1 (127.0.0.1, ")
    assert event.by.endswith(" got SIGTERM")
    assert not made.lead.ask_to_drain("SIGTERM")
    made.lead.stop()
    assert next_event(member) == Stopped()
    member.__exit__(None, None, None)
    begin_s = time.monotonic()
    made.lead.__exit__(None, None, None)
    assert time.monotonic() - begin_s < lead_module.BYE_S / 2
    assert not any("error" in note for note in made.notes)


def test_a_node_that_does_not_say_goodbye_is_not_waited_for_long(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lead_module, "BYE_S", 0.2)
    made = cluster(2)
    made.agreed()
    made.lead.stop()
    made.lead.__exit__(None, None, None)
    assert made.notes[-1] == "error: not every node said that it ended its processes"


# `meet`.


def config_of(**launch: Any) -> AppConfig:
    return AppConfig(model=ModelConfig(name="tiny", path="x"), launch=LaunchConfig(**launch))


def test_one_node_needs_nobody() -> None:
    assert isinstance(meet(Site(), config_of(), Display()), SingleNode)


def test_several_nodes_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    site = Site(nnodes=2, node_rank=0, rendezvous="127.0.0.1:20000")
    with pytest.raises(ConfigError, match=r"set cluster\.token_file=FILE"):
        meet(site, config_of(), Display())


def test_several_nodes_need_an_address() -> None:
    with pytest.raises(ConfigError, match=r"launch\.dist_init_addr=HOST:PORT"):
        meet(Site(nnodes=2), config_of(), Display())


def test_node_0_says_where_it_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "x" * 32)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    site = Site(nnodes=2, node_rank=0, rendezvous=f"127.0.0.1:{port}")
    with meet(site, config_of(), Display()) as group:
        assert isinstance(group, Lead)
        assert len(bytes.fromhex(group.wire_key)) == 32
    assert f"node 0 of 2 listens at 127.0.0.1:{port}, interface lo" in capsys.readouterr().err
