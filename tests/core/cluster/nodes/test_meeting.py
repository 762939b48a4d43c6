"""Node 0 and other nodes in one process: how they meet and agree."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest

from core.cluster.nodes.lead import Lead
from core.cluster.nodes.member import reach
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.nodes.rendezvous import meet
from core.cluster.nodes.secret import TOKEN_VARIABLE
from core.cluster.processes.display import Display
from core.cluster.processes.group import Ended, GroupError, SingleNode
from core.errors import ConfigError, ResourceError
from core.interfaces.launcher import Site
from core.settings.config import AppConfig, LaunchConfig, ModelConfig
from tests.support.cluster import KEY, LIMIT_S, Cluster, error_of

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
        links = NodeLinks(interval_s=1, timeout_s=10, key=KEY)
        links.listen(socket.create_server(("127.0.0.1", port)))
        outcome.result(LIMIT_S).close()
        links.close()


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
        links = NodeLinks(interval_s=1, timeout_s=10, key=KEY)
        links.listen(socket.create_server(("127.0.0.1", port)))
        outcome.result(LIMIT_S).close()
        links.close()


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
