"""The supervisor with small real children: failures, frozen ones, and no orphans, ever."""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.cluster.processes.process_stat import process_state
from core.interfaces.control import ChildStatus
from tests.support.supervised import END_LIMIT_S, HEALTHY, ROOT, Run, kill

# Failures while running.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_named_and_told_to_the_frontend_first(
    engine: Callable[..., Run], number: int
) -> None:
    run = engine(HEALTHY, when_ready=kill("worker 1", number))
    assert run.exit_code == 1
    (text,) = run.errors
    pid = run.infos["worker 1"]["pid"]
    assert text.startswith(f"worker 1 (pid {pid}) was killed by {signal.Signals(number).name}")
    assert ("memory runs out, see `dmesg`" in text) == (number == signal.SIGKILL)
    assert text.endswith("; the engine ends")
    (death,) = run.events("engine_died")
    assert death["cause"] == (f"worker 1 (pid {pid}) was killed by {signal.Signals(number).name}")
    assert run.end_seconds < END_LIMIT_S


def test_a_frontend_that_does_not_end_is_killed_in_time(engine: Callable[..., Run]) -> None:
    children = HEALTHY | {"frontend": {"mode": "frontend", "ignore_death": True}}
    run = engine(children, when_ready=kill("worker 0", signal.SIGKILL))
    assert run.exit_code == 1
    assert len(run.events("engine_died")) == 1
    assert run.end_seconds < END_LIMIT_S


def test_a_dead_frontend_ends_the_workers(engine: Callable[..., Run]) -> None:
    children = {"worker 0": "worker", "worker 1": "deaf", "frontend": "frontend"}
    run = engine(children, when_ready=kill("frontend", signal.SIGKILL))
    assert run.exit_code == 1
    assert run.errors[0].startswith("frontend (pid ")
    assert run.end_seconds < END_LIMIT_S


def test_the_cause_is_reported_not_its_echo(engine: Callable[..., Run], tmp_path: Path) -> None:
    """Rank 0 complains about its silent peer before the peer's death is noticed."""
    trigger = tmp_path / "trigger"
    os.mkfifo(trigger)
    echo = {"mode": "echo_then_hang", "trigger": str(trigger)}

    def when_ready(run: Run) -> None:
        trigger.write_text("now\n")

    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        if type(status).__name__ == "Failed":
            os.kill(run.infos["worker 1"]["pid"], signal.SIGKILL)

    run = engine(
        {"worker 0": echo, "worker 1": "worker", "frontend": "frontend"},
        when_ready=when_ready,
        on_status=on_status,
    )
    assert run.exit_code == 1
    (text,) = run.errors
    assert text.startswith(f"worker 1 (pid {run.infos['worker 1']['pid']}) was killed by SIGKILL")


def test_an_echo_without_another_cause_is_reported(
    engine: Callable[..., Run], tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger"
    os.mkfifo(trigger)
    run = engine(
        {"worker 0": {"mode": "echo_then_hang", "trigger": str(trigger)}, "worker 1": "worker"},
        when_ready=lambda run: trigger.write_text("now\n") and None,
    )
    assert (run.exit_code, run.errors) == (1, ["rank 1 does not answer"])


@dataclass
class SlowEnd:
    """Keeps a killed process from being reaped, as a GPU's driver does: its thread is traced, and
    stays until the tracer has looked at it. All of its files are closed by then."""

    run: Run
    name: str
    error_s: float = -1.0  # from the kill to the error
    state: str = ""  # of the process when the error was told

    def begin(self) -> None:
        """Kill it, and return when its files are closed; let it go once an error was told."""
        pid = self.run.infos[self.name]["pid"]
        ready = threading.Event()
        threading.Thread(target=self._hold, args=(pid, ready), daemon=True).start()
        assert ready.wait(20)
        if self.state == "refused":
            pytest.skip("this system lets nobody trace")
        begin_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while process_state(pid) != "Z":
            assert time.monotonic() - begin_s < 20
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def _hold(self, pid: int, ready: threading.Event) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        seize, all_threads = 0x4206, 0x40000000  # PTRACE_SEIZE, __WALL
        thread = max(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
        if thread == pid or libc.ptrace(seize, thread, None, None) != 0:
            self.state = "refused"
        ready.set()
        begin_s = time.monotonic()
        while self.state != "refused" and not self.run.errors:
            time.sleep(0.005)
        self.error_s, self.state = time.monotonic() - begin_s, process_state(pid) or self.state
        os.waitpid(thread, all_threads)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
@pytest.mark.parametrize(
    "echo",
    [
        None,
        {},
        {"blames": ["worker 1"]},
        {"blames": ["worker 1", "worker 2"]},
        {"bug": True},
        {"abort": True},
    ],
    ids=str,
)
def test_a_killed_worker_that_takes_long_to_end_is_named_at_once(
    engine: Callable[..., Run], tmp_path: Path, echo: dict[str, Any] | None
) -> None:
    """Whether or not its peer complains, and however: long before the kernel is done with it."""
    trigger = tmp_path / "trigger"
    os.mkfifo(trigger)
    peer = {"mode": "worker"} if echo is None else {"mode": "echo_then_hang", **echo}
    ends: list[SlowEnd] = []

    def when_ready(run: Run) -> None:
        ends.append(SlowEnd(run, "worker 1"))
        ends[0].begin()
        if echo is not None:
            trigger.write_text("now\n")

    children = {"worker 0": peer | {"trigger": str(trigger)}}
    run = engine(HEALTHY | children, when_ready=when_ready)
    (text,) = run.errors
    assert text.startswith(f"worker 1 (pid {run.infos['worker 1']['pid']}) was killed by SIGKILL")
    assert ends[0].state == "Z", "it was not reaped before"
    assert run.exit_code == 1
    assert run.end_seconds < END_LIMIT_S


def test_a_blamed_worker_that_lives_is_named_with_who_misses_it(
    engine: Callable[..., Run], tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger"
    os.mkfifo(trigger)
    echo = {"mode": "echo_then_hang", "trigger": str(trigger), "blames": ["worker 1"]}
    run = engine(
        HEALTHY | {"worker 0": echo}, when_ready=lambda run: trigger.write_text("now\n") and None
    )
    pids = {name: run.infos[name]["pid"] for name in ("worker 0", "worker 1")}
    brief = f"worker 1 (pid {pids['worker 1']}) stopped answering"
    found = f"{brief}, as worker 0 (pid {pids['worker 0']}) found: rank 1 does not answer"
    assert run.errors == [found]
    assert [death["cause"] for death in run.events("engine_died")] == [brief]
    assert run.end_seconds < END_LIMIT_S


def test_what_a_worker_started_ends_with_it(engine: Callable[..., Run]) -> None:
    others: list[int] = []

    def when_ready(run: Run) -> None:
        others.append(os.pidfd_open(run.infos["worker 0"]["other"]))
        os.kill(run.infos["worker 0"]["pid"], signal.SIGKILL)

    engine({"worker 0": "parent_of_another"}, when_ready=when_ready)
    assert all_ended(others)


# Frozen.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_worker_ends_everything(engine: Callable[..., Run]) -> None:
    run = engine(HEALTHY, when_ready=kill("worker 1", signal.SIGSTOP))
    assert run.exit_code == 1
    (text,) = run.errors
    pid = run.infos["worker 1"]["pid"]
    assert text == (
        f"worker 1 (pid {pid}) is frozen: it was stopped by a signal (SIGSTOP); the engine ends"
    )
    assert len(run.events("engine_died")) == 1
    assert run.end_seconds < END_LIMIT_S


def test_a_worker_stuck_in_a_step_ends_everything(engine: Callable[..., Run]) -> None:
    """It heartbeats, and its step does not end."""
    children = HEALTHY | {"worker 1": {"mode": "stuck", "launched": 8, "finished": 7}}
    run = engine(children, step_timeout_s=1.0)
    assert run.exit_code == 1
    (text,) = run.errors
    assert text.startswith("worker 1 (pid ")
    assert text.endswith(
        "is frozen: step 8 made no progress for 1 s (launch.step_timeout_s); the engine ends"
    )


# The supervisor itself.


def all_ended(pidfds: list[int], timeout_s: float = 10.0) -> bool:
    """Wait until every process behind these descriptors ended."""
    poller = select.poll()
    for fd in pidfds:
        poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    left = set(pidfds)
    while left and time.monotonic() < deadline:
        for fd, _ in poller.poll(timeout_s * 1000):
            poller.unregister(fd)
            left.discard(fd)
    return not left


def start_supervisor(*arguments: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A supervisor in a session of its own, and descriptors of its ready children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.supervise", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    return process, [os.pidfd_open(pid) for pid in pids]


@pytest.mark.parametrize("means", ["end of input", "pdeathsig"])
def test_children_end_when_the_supervisor_is_killed(tmp_path: Path, means: str) -> None:
    process, pidfds = start_supervisor(str(tmp_path / "log"), means)
    assert len(pidfds) == 3
    process.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert all_ended(pidfds)


def test_ctrl_c_reaches_the_supervisor_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, pidfds = start_supervisor(str(log), "end of input")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")
    assert all_ended(pidfds)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("drain") == 1
