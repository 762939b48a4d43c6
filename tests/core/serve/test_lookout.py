"""A frontend that finds out by itself what its parent does not tell."""

import math
from collections.abc import Callable

import pytest

from core.cluster.processes import watch_clock
from core.serve import lookout as module
from core.serve.lookout import LOOK_S, Lookout

PARENT, WORKER, OTHER = 10, 11, 12
Look = Callable[[float], str | None]


class Machine:
    """Stands in for the kernel and for `time`."""

    def __init__(self) -> None:
        self.states = {PARENT: "S", WORKER: "R", OTHER: "S"}
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def process_state(self, pid: int) -> str:
        return self.states.get(pid, "")

    def look(self, lookout: Lookout, seconds: float) -> str | None:
        """What it finds in so many seconds."""
        for _ in range(int(seconds / LOOK_S)):
            self.now_s += LOOK_S
            if (found := lookout.look()) is not None:
                return found
        return None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(module, "process_state", made.process_state)
    monkeypatch.setattr(watch_clock, "time", made)
    return made


def lookout(parent_limit_s: float = math.inf) -> Lookout:
    workers = {"worker 0": WORKER, "worker 1": OTHER}
    return Lookout(workers, PARENT, parent_limit_s=parent_limit_s)


def test_nothing_is_found_where_all_is_well(machine: Machine) -> None:
    assert machine.look(lookout(1.0), 100) is None


@pytest.mark.parametrize(("state", "what"), [("Z", "ended"), ("", "ended"), ("T", "is stopped")])
def test_a_worker_is_missed_where_the_parent_is_stopped(
    machine: Machine, state: str, what: str
) -> None:
    watching = lookout()
    machine.states[PARENT] = "T"
    assert machine.look(watching, 100) is None
    machine.states[OTHER] = state
    begin_s = machine.now_s
    assert machine.look(watching, 10) == (
        f"worker 1 (pid {OTHER}) {what}, and the parent process (pid {PARENT}), which should have "
        "said so, is stopped"
    )
    assert machine.now_s - begin_s <= module.PARENT_FIRST_S + LOOK_S


def test_the_parent_has_time_to_say_it_first(machine: Machine) -> None:
    watching = lookout()
    machine.states[WORKER] = "T"
    assert machine.look(watching, module.PARENT_FIRST_S) is None
    machine.states[WORKER] = "S"
    assert machine.look(watching, 10) is None


def test_a_stopped_parent_of_several_nodes_was_given_up(machine: Machine) -> None:
    watching = lookout(parent_limit_s=2.0)
    machine.states[PARENT] = "T"
    found = machine.look(watching, 10)
    assert found is not None
    assert found.startswith(f"the parent process (pid {PARENT}) of node 0 is stopped")
    assert 2.0 <= machine.now_s <= 3.0


def test_a_pause_of_all_is_nobody_s_end(machine: Machine) -> None:
    watching = lookout(parent_limit_s=2.0)
    machine.states |= {PARENT: "T", WORKER: "T"}
    assert machine.look(watching, LOOK_S) is None
    machine.now_s += 1000
    assert watching.look() is None
    machine.states |= {PARENT: "S", WORKER: "S"}
    assert machine.look(watching, 10) is None


def test_where_the_system_tells_no_states_nothing_is_found(machine: Machine) -> None:
    machine.states = {}
    assert machine.look(lookout(1.0), 100) is None
