"""Which of several failed processes is named."""

import math
import signal
from typing import Any

import pytest

from core.cluster.processes.blame import BLAMED_S, ENDING_S, SETTLE_S, cause, likeliest, patience_s
from core.cluster.processes.process import Child, ProcessSpec
from core.interfaces.control import Failed

KILLED, ABORTED = -signal.SIGKILL, -signal.SIGABRT
BUG, USER_S = Failed("internal", "a bug"), Failed("ModelError", "no such file")
MISSES_1, MISSES_ANY = Failed("WorkerDied", "x", ["worker 1"]), Failed("internal", "x", ["a", "b"])


def child(rank: int, wrong_s: float = 0.0, **values: Any) -> Child:
    """A child that was never started."""
    made = object.__new__(Child)
    made.spec = ProcessSpec(name=f"worker {rank}", module="", boot=b"", is_worker=True)
    made.failed = made.frozen = made.returncode = made.ended_as = None
    made.is_ending = "ended_as" in values or not values
    made.wrong_s = wrong_s
    made._process = type("Process", (), {"pid": 100 + rank})()
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"failed": MISSES_1}, {"ended_as": KILLED}),
        ({"failed": MISSES_1}, {"ended_as": -signal.SIGSEGV}),
        ({"failed": MISSES_1}, {"ended_as": None}),
        ({"failed": MISSES_1}, {"failed": BUG}),  # an error of CUDA, of memory: its own
        ({"failed": MISSES_ANY}, {"failed": BUG}),
        ({"failed": MISSES_1}, {"failed": USER_S}),
        ({"failed": MISSES_1}, {"frozen": "is frozen"}),
        ({"failed": MISSES_1}, {"ended_as": ABORTED}),
        ({"failed": BUG}, {"ended_as": KILLED}),
        ({"failed": BUG}, {"failed": USER_S}),
        ({"ended_as": ABORTED}, {"ended_as": KILLED}),
        ({"ended_as": ABORTED}, {"ended_as": 7}),
    ],
)
def test_the_cause_is_named_whichever_comes_first(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for at in (-1.0, 1.0):
        echo, culprit = child(0, at, **first), child(1, **second)
        assert likeliest([echo, culprit]) is culprit
        assert likeliest([culprit, echo]) is culprit


def test_of_equals_the_first_is_named() -> None:
    late, early = child(0, 2.0, failed=BUG), child(1, 1.0, failed=BUG)
    frozen = child(2, math.inf, frozen="is frozen")
    assert likeliest([late, early]) is early
    assert likeliest([frozen, child(3, 1.0, ended_as=KILLED)]).ended_as == KILLED


@pytest.mark.parametrize(
    ("values", "patience"),
    [
        ({"ended_as": KILLED}, 0.0),
        ({"ended_as": None}, ENDING_S),
        ({"frozen": "is frozen"}, 0.0),
        ({"failed": USER_S}, 0.0),
        ({"failed": BUG}, SETTLE_S),
        ({"ended_as": ABORTED}, SETTLE_S),
        ({"failed": MISSES_1}, BLAMED_S),
    ],
)
def test_only_what_may_be_an_echo_waits(values: dict[str, Any], patience: float) -> None:
    assert patience_s(child(0, **values)) == patience


def test_blamed_processes_are_named_first() -> None:
    here = [child(0, failed=MISSES_ANY), child(1)]
    assert cause(child(0, failed=MISSES_1), here) == (
        "worker 1 (pid 101) stopped answering",
        "worker 1 (pid 101) stopped answering, as worker 0 (pid 100) found: x",
    )
    brief, _ = cause(here[0], here)
    assert brief == "a or b stopped answering", "those of other nodes by name alone"
    assert cause(child(1, ended_as=None))[0] == (
        "worker 1 (pid 101) ended (the kernel is not done with it yet)"
    )
