"""Frozen processes are found, and busy ones are not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from core.cluster.processes import process as process_module
from core.cluster.processes import watch_clock as watch_clock_module
from core.cluster.processes import watchdog as module
from core.cluster.processes.motion import ACTIVE_CPU_S, PATIENCE, Motion
from core.cluster.processes.process import Child
from core.cluster.processes.process_stat import process_state
from core.cluster.processes.watchdog import Watchdog
from core.interfaces.control import Heartbeat


class Clock:
    """Stands in for `time` in the modules that measure."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(process_module, "time", made)
    monkeypatch.setattr(watch_clock_module, "time", made)
    return made


def child(clock: Clock, pid: int = 0) -> Any:
    """A child that was never started: only what the watchdog looks at."""
    made = object.__new__(Child)
    made.frozen, made.returncode, made.heartbeat_s = None, None, None
    made.motion = Motion(clock.now_s)
    made._process = type("Process", (), {"pid": pid})()  # type: ignore[assignment]
    return made


def run(clock: Clock, watchdog: Watchdog, children: dict[Any, list[tuple[float, ...]]]) -> None:
    """Heartbeats four times a second; the last of each child's counts stays."""
    for turn in range(max(map(len, children.values()))):
        clock.now_s += 0.25
        for found, counts in children.items():
            found._count(Heartbeat(*counts[min(turn, len(counts) - 1)]))  # type: ignore[arg-type]
        watchdog.look(list(children))


def test_a_worker_that_goes_on_is_fine(clock: Clock) -> None:
    worker = child(clock)
    run(clock, Watchdog(2.0), {worker: [(step + 1, step) for step in range(100)]})
    assert worker.frozen is None


def test_an_idle_worker_is_fine(clock: Clock) -> None:
    worker = child(clock)
    run(clock, Watchdog(2.0), {worker: [(7, 7)] * 100})
    assert worker.frozen is None


def test_a_step_has_its_whole_time_from_its_start(clock: Clock) -> None:
    worker = child(clock)
    watchdog = Watchdog(2.0)
    run(clock, watchdog, {worker: [(7, 7)] * 100})
    run(clock, watchdog, {worker: [(8, 7)] * 8})
    assert worker.frozen is None
    run(clock, watchdog, {worker: [(8, 7)]})
    assert worker.frozen == ("is frozen: step 8 made no progress for 2 s (launch.step_timeout_s)")


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_named(clock: Clock) -> None:
    ahead, behind = child(clock), child(clock)
    run(clock, Watchdog(2.0), {ahead: [(9, 8)] * 12, behind: [(8, 7)] * 12})
    assert behind.frozen is not None
    assert ahead.frozen is None


def test_a_step_that_finishes_layers_is_fine_however_long_it_takes(clock: Clock) -> None:
    worker = child(clock)
    run(clock, Watchdog(2.0), {worker: [(8, 7, turn // 7) for turn in range(400)]})
    assert worker.frozen is None
    run(clock, Watchdog(2.0), {worker: [(8, 7, 400)] * 9})
    assert worker.frozen == "is frozen: step 8 made no progress for 2 s (launch.step_timeout_s)"


def test_a_starved_layer_is_fine_as_long_as_its_thread_computes(clock: Clock) -> None:
    """It gets a tenth of a core."""
    worker = child(clock)
    run(clock, Watchdog(3.0), {worker: [(8, 7, 5, 0.025 * turn) for turn in range(100)]})
    assert worker.frozen is None


def test_waking_now_and_then_is_no_progress(clock: Clock) -> None:
    worker = child(clock)
    little = ACTIVE_CPU_S / 100
    run(clock, Watchdog(3.0), {worker: [(8, 7, 5, little * turn) for turn in range(13)]})
    assert worker.frozen == "is frozen: step 8 made no progress for 3 s (launch.step_timeout_s)"


@pytest.mark.parametrize("expected_s", [0.0, 0.1, 1.0])
def test_a_thread_that_spins_is_found_by_what_the_step_should_take(
    clock: Clock, expected_s: float
) -> None:
    worker = child(clock)
    limit_s = max(2.0, PATIENCE * expected_s)
    spins = [(8, 7, 5, turn / 4, expected_s) for turn in range(1000)]
    watchdog = Watchdog(2.0)
    run(clock, watchdog, {worker: spins[: int(4 * limit_s)]})
    assert worker.frozen is None
    run(clock, watchdog, {worker: spins[int(4 * limit_s) : int(4 * limit_s) + 1]})
    assert worker.frozen is not None
    assert f"step 8 used {limit_s:.0f} s of CPU time without finishing a piece" in worker.frozen


def test_who_waits_for_a_slow_rank_is_not_the_one_that_is_frozen(clock: Clock) -> None:
    waits, slow, watchdog = child(clock), child(clock), Watchdog(2.0)
    run(
        clock,
        watchdog,
        {waits: [(8, 7, 5)] * 16, slow: [(8, 7, 4, turn / 9) for turn in range(16)]},
    )
    assert (waits.frozen, slow.frozen) == (None, None)
    run(clock, watchdog, {waits: [(8, 7, 5)] * 9, slow: [(8, 7, 4, 15 / 9)] * 9})
    assert waits.frozen is None
    assert slow.frozen == "is frozen: step 8 made no progress for 2 s (launch.step_timeout_s)"


def test_silence_is_found_but_not_before_the_first_beat(clock: Clock) -> None:
    starting, silent = child(clock), child(clock)
    watchdog = Watchdog(60.0)
    silent._count(Heartbeat(0, 0))
    for _ in range(int(module.SILENT_S / module.LOOK_S)):
        assert silent.frozen is None
        clock.now_s += module.LOOK_S
        watchdog.look([starting, silent])
    assert silent.frozen == "is frozen: it said nothing for 15 s"
    assert starting.frozen is None


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def wait_for_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 10
    while process_state(pid) != state:
        assert time.monotonic() < deadline, process_state(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_process_is_found_if_it_stays_so(
    clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    worker = child(clock, sleeper.pid)
    watchdog = Watchdog(60.0)

    def look() -> str | None:
        clock.now_s += module.STOPPED_S / 2 + 0.01
        watchdog.look([worker])
        return worker.frozen  # type: ignore[no-any-return]

    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for_state(sleeper.pid, "T")
    assert look() is None
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_for_state(sleeper.pid, "S")
    assert look() is None
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for_state(sleeper.pid, "T")
    assert look() is None
    assert look() is None
    assert look() == "is frozen: it was stopped by a signal (SIGSTOP)"


def test_a_process_that_is_gone_has_no_state() -> None:
    assert process_state(2**22 + 1) == ""


def test_a_pause_of_the_watcher_itself_is_nobody_s_silence(clock: Clock) -> None:
    """As after `docker pause` for longer than all limits together."""
    stepping, idle = child(clock), child(clock)
    watchdog = Watchdog(2.0)
    run(clock, watchdog, {stepping: [(8, 7)] * 4, idle: [(7, 7)] * 4})
    clock.now_s += 100.0
    assert watchdog.look([stepping, idle]) == pytest.approx(100.0 - module.LONGEST_GAP_S)
    assert (stepping.frozen, idle.frozen) == (None, None)
    run(clock, watchdog, {stepping: [(9, 8)] * 7, idle: [(7, 7)] * 7})
    assert (stepping.frozen, idle.frozen) == (None, None)
    run(clock, watchdog, {stepping: [(9, 8)] * 2, idle: [(7, 7)] * 2})
    assert stepping.frozen == "is frozen: step 9 made no progress for 2 s (launch.step_timeout_s)"


def test_who_stays_silent_after_a_pause_is_found(clock: Clock) -> None:
    silent = child(clock)
    watchdog = Watchdog(60.0)
    run(clock, watchdog, {silent: [(0, 0)]})
    clock.now_s += 100.0
    watchdog.look([silent])
    assert silent.frozen is None
    for _ in range(int((module.SILENT_S - module.LONGEST_GAP_S) / module.LOOK_S)):
        clock.now_s += module.LOOK_S
        watchdog.look([silent])
    assert silent.frozen == "is frozen: it said nothing for 15 s"
