"""What strangers may cost: connections, time, lines."""

from collections.abc import Callable
from typing import Any

import pytest

from core.cluster.nodes import strangers as module
from core.cluster.nodes.strangers import RefusalLog, Strangers


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def link(host: str) -> Any:
    return type("FakeLink", (), {"peer_host": host})()


def test_time_is_limited_from_the_arrival(clock: Clock) -> None:
    strangers = Strangers()
    first, second = link("a"), link("a")
    strangers.add(first)
    clock.now_s += 1
    strangers.add(second)
    assert strangers.next_late_s == 100 + module.HANDSHAKE_S
    clock.now_s = 100 + module.HANDSHAKE_S
    assert strangers.late() == [first]
    strangers.remove(first)
    assert strangers.late() == []
    assert strangers.links() == [second]


def test_one_address_with_many_connections_crowds_out_itself(clock: Clock) -> None:
    strangers = Strangers()
    node = link("10.0.0.2")
    strangers.add(node)
    noisy = [link("10.0.0.66") for _ in range(3 * module.MAX_STRANGERS)]
    for coming in noisy:
        if (crowded := strangers.crowded_out()) is not None:
            strangers.remove(crowded)
        strangers.add(coming)
    left = strangers.links()
    assert left == [node, *noisy[1 - module.MAX_STRANGERS :]]


def told(log: RefusalLog, hosts: list[str], reason: Callable[[str], str]) -> list[str]:
    lines = [log.line(host, reason(host), f"refused {host}") for host in hosts]
    return [line for line in lines if line is not None]


def test_each_address_and_reason_is_told_once(clock: Clock) -> None:
    log = RefusalLog()
    assert told(log, ["a", "b", "a", "a"], lambda host: "wrong") == ["refused a", "refused b"]
    assert log.line("a", "late", "refused a") == (
        "refused a (2 more were refused since the last such line)"
    )


def test_lines_and_memory_are_bounded_whatever_addresses_and_reasons(clock: Clock) -> None:
    log = RefusalLog()
    hosts = [f"fd00::{number:x}" for number in range(10_000)]
    assert len(told(log, hosts, lambda host: f"a reason of {host}")) == module.BURST_LINES
    log.count(5)
    clock.now_s += module.LINE_EVERY_S
    assert told(log, ["late", "later"], lambda host: "x") == [
        f"refused late ({10_000 - module.BURST_LINES + 5} more were refused since the last such "
        "line)"
    ]
    for number in range(10_000):  # one whenever a line is due
        clock.now_s += module.LINE_EVERY_S
        log.line(str(number), "x", "refused")
    assert len(log._told) == module.MAX_REMEMBERED
