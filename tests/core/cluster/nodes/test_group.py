"""Node 0 and other nodes in one process: what they tell each other, and how they end together."""

import time
from collections.abc import Callable

import pytest

from core.cluster.nodes import lead as lead_module
from core.cluster.nodes.link_events import Broken, Turned
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.processes.group import DrainAsked, Ended, GroupError, Heard, Stopped
from core.interfaces.control import Failed, Heartbeat, Ready, StartPhase
from tests.support.cluster import LIMIT_S, Cluster, next_event


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
    one._links.close()
    event = next_event(made.lead)
    assert isinstance(event, Ended)
    assert event.text.startswith("node 1 (127.0.0.1, ")
    assert "is gone: the other side closed the connection" in event.text
    assert (event.brief, event.exit_code) == ("node 1 is gone", 1)
    assert next_event(two) == event


def test_node_0_gone_is_named(cluster: Callable[..., Cluster]) -> None:
    made = cluster(2)
    made.agreed()
    made.lead._links.close()
    event = next_event(made.members[0])
    assert isinstance(event, Ended)
    assert event.text.startswith("node 0 (127.0.0.1:")


def test_silence_names_the_link_on_both_sides(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both threads live, and neither hears the other's heartbeats."""
    made = cluster(2, timeout_s=0.5)
    made.agreed()

    def say_nothing(links: NodeLinks) -> None:
        links._next_beat_s = time.monotonic() + 0.05

    monkeypatch.setattr(NodeLinks, "_beat", say_nothing)
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
    made.lead._links._say(Broken("this node's links failed"))
    with pytest.raises(GroupError, match="node 0: this node's links failed; the engine ends"):
        made.agree(made.lead).result(LIMIT_S)
    member = made.join(1)
    member._links._say(Broken("this node's links failed"))
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
