"""The supervisor with small real children: starts, failures, signals, and no orphans, ever."""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.cluster.processes.group import (
    DrainAsked,
    Ended,
    Group,
    GroupEvent,
    Heard,
    SingleNode,
    Stopped,
)
from core.cluster.processes.process import ProcessSpec
from core.cluster.processes.process_stat import process_state
from core.cluster.processes.signals import OwnSignals, signal_pipe
from core.cluster.processes.supervisor import FAREWELL_S, Supervisor
from core.interfaces.control import ChildStatus, Failed, Progress, Ready, StartPhase
from core.interfaces.launcher import Site
from core.settings.config import LaunchConfig

ROOT = Path(__file__).parents[4]
END_LIMIT_S = 2.0  # what the engine promises from a failure to the end of the last process


@dataclass
class Run:
    """One supervised engine, after its end."""

    log: Path
    exit_code: int = -1
    errors: list[str] = field(default_factory=list)
    statuses: list[tuple[str, ChildStatus]] = field(default_factory=list)
    infos: dict[str, Any] = field(default_factory=dict)
    end_seconds: float = 0.0  # from the event that the test causes

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Runs a supervisor in this process. `children` maps a name to a mode or a boot line;
    `when_ready(run)` is called when all are ready, `on_status(run, name, status)` at each status.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}

    def run(
        children: dict[str, str | dict[str, Any]],
        *,
        when_ready: Callable[[Run], None] = lambda run: None,
        on_status: Callable[[Run, str, ChildStatus], None] = lambda run, name, status: None,
        group: Group | None = None,
        dropped_lines: Callable[[], int] = lambda: 0,
        signals: Callable[[], AbstractContextManager[socket.socket]] = signal_pipe,
        **launch: Any,
    ) -> Run:
        result = Run(tmp_path / "log")
        started = time.monotonic()

        def spec(name: str, boot: str | dict[str, Any]) -> ProcessSpec:
            boot = {"mode": boot} if isinstance(boot, str) else boot
            return ProcessSpec(
                name=name,
                module="tests.support.child",
                boot=json.dumps(boot | {"log": str(result.log)}).encode(),
                env={"PYTHONPATH": str(ROOT)},
                is_worker=name.startswith("worker"),
                node=None if group is None else group.site.node_rank,
            )

        def status(name: str, status: ChildStatus) -> None:
            result.statuses.append((name, status))
            on_status(result, name, status)

        def ready(infos: dict[str, Ready]) -> None:
            nonlocal started
            result.infos = {name: ready.info for name, ready in infos.items()}
            started = time.monotonic()
            when_ready(result)

        def error(text: str) -> None:
            result.errors.append(text)
            if not result.infos:
                nonlocal started
                started = time.monotonic()

        supervisor = Supervisor(
            [spec(name, boot) for name, boot in children.items()],
            LaunchConfig(**launch),
            on_status=status,
            on_ready=ready,
            on_error=error,
            dropped_lines=dropped_lines,
            group=group,
            signals=signals,
        )
        result.exit_code = supervisor.run()
        result.end_seconds = time.monotonic() - started
        assert psutil.Process().children(recursive=True) == []
        return result

    yield run
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def kill(name: str, number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.infos[name]["pid"], number)


def signal_self(*numbers: int) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


# In a thread, where the process's signals are somebody else's.


@pytest.mark.parametrize("exit_code", [0, 1])
def test_in_a_thread_it_is_told_by_hand(engine: Callable[..., Run], exit_code: int) -> None:
    """An end that is asked for, and one that nobody asked for and no SIGCHLD tells of."""
    signals = OwnSignals()

    def act(run: Run) -> None:
        if exit_code:
            kill("worker 1", signal.SIGKILL)(run)
        else:
            signals.send(signal.SIGTERM)

    children = {"worker 0": "worker", "worker 1": "worker"}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(engine, children, when_ready=act, signals=signals.pipe).result(30)
    assert run.exit_code == exit_code
    assert run.end_seconds < END_LIMIT_S
    assert [("worker 1" in text and "SIGKILL" in text) for text in run.errors] == [True] * exit_code
    signals.send(signal.SIGTERM)  # too late, and no error


HEALTHY = {"worker 0": "worker", "worker 1": "worker", "frontend": "frontend"}


# Start.


def test_statuses_arrive_in_order_and_frontends_hear_when_the_workers_are_ready(
    engine: Callable[..., Run],
) -> None:
    children = HEALTHY | {"worker 0": {"mode": "worker", "info": {"kv_tokens": 4096}}}
    run = engine(children, when_ready=signal_self(signal.SIGTERM))
    assert run.exit_code == 0
    said = [status for name, status in run.statuses if name == "worker 1"]
    assert said[:2] == [StartPhase("import", 0.5), Progress("load weights", 1, 2, "tensors")]
    assert isinstance(said[2], Ready)
    assert set(run.infos) == set(HEALTHY)
    (greeting,) = run.events("engine_ready")
    assert greeting["info"] == run.infos["worker 0"]
    assert greeting["info"]["kv_tokens"] == 4096
    workers = {name: run.infos[name]["pid"] for name in ("worker 0", "worker 1")}
    assert greeting["workers"] == workers


def test_dropped_lines_of_all_processes_reach_the_frontend(engine: Callable[..., Run]) -> None:
    children = HEALTHY | {
        "worker 0": {"mode": "worker", "dropped": 3},
        "worker 1": {"mode": "worker", "dropped": 4},
    }
    run = engine(children, dropped_lines=lambda: 10, when_ready=signal_self(signal.SIGTERM))
    assert run.events("lines_dropped")[-1]["lines"] == 17


def test_a_boot_line_larger_than_a_pipe_arrives_whole(engine: Callable[..., Run]) -> None:
    boot = {"mode": "worker", "shape": "x" * 3_000_000}
    run = engine({"worker 0": boot}, when_ready=signal_self(signal.SIGTERM))
    assert run.exit_code == 0
    assert run.events("boot")[0]["size"] > 3_000_000


@pytest.mark.parametrize(
    ("mode", "text", "exit_code"),
    [
        ("model_error", "model.safetensors is truncated", 2),
        ("plan_error", "the plan does not fit:\n  - parallel.tp=7: 9 heads can't be cut", 2),
    ],
)
def test_a_user_s_error_in_every_worker_is_reported_once_as_it_is(
    engine: Callable[..., Run], mode: str, text: str, exit_code: int
) -> None:
    run = engine({"worker 0": mode, "worker 1": mode, "worker 2": "hang", "frontend": "frontend"})
    assert (run.exit_code, run.errors) == (exit_code, [text])
    assert run.end_seconds < END_LIMIT_S


def test_a_bug_is_reported_with_its_process_and_traceback(engine: Callable[..., Run]) -> None:
    run = engine({"worker 0": "worker", "worker 1": "bug"})
    assert run.exit_code == 1
    (text,) = run.errors
    assert text.startswith("worker 1 (pid ")
    assert "Traceback" in text
    assert text.endswith("ZeroDivisionError: a bug")


def test_an_exit_without_a_word_is_reported_with_its_status(engine: Callable[..., Run]) -> None:
    run = engine({"worker 0": "silent_exit", "worker 1": "hang"})
    assert run.exit_code == 1
    (text,) = run.errors
    assert text.startswith("worker 0 (pid ")
    assert text.endswith(") ended with exit status 7; the engine ends")
    assert run.end_seconds < END_LIMIT_S


def test_last_words_larger_than_a_pipe_are_all_heard(engine: Callable[..., Run]) -> None:
    run = engine({"worker 0": {"mode": "flood", "count": 300}})
    assert run.errors == ["the last word"]
    assert sum(isinstance(status, Progress) for _, status in run.statuses) == 300


def test_a_start_without_progress_names_who_is_waited_for(engine: Callable[..., Run]) -> None:
    run = engine({"worker 0": "worker", "worker 1": "hang"}, startup_timeout_s=1.0)
    assert run.exit_code == 1
    (text,) = run.errors
    head, *waiting = text.splitlines()
    assert head == ("no process made progress for 1 s (launch.startup_timeout_s); waiting for")
    assert len(waiting) == 1
    assert waiting[0].startswith("  worker 1 (pid ")
    assert waiting[0].endswith("): last heard: 'import' ended after 0.5 s")
    assert run.end_seconds < END_LIMIT_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(engine: Callable[..., Run], number: int) -> None:
    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        if name == "worker 1":
            os.kill(os.getpid(), number)

    run = engine({"worker 0": "worker", "worker 1": "hang"}, on_status=on_status)
    assert (run.exit_code, run.errors) == (128 + number, [])


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


# Ends.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_status_0(engine: Callable[..., Run], number: int) -> None:
    run = engine(HEALTHY, when_ready=signal_self(number), shutdown_grace_s=12.5)
    assert (run.exit_code, run.errors) == (0, [])
    assert [event["grace_s"] for event in run.events("drain")] == [12.5]
    assert run.end_seconds < END_LIMIT_S


def test_an_engine_without_frontend_ends_at_once(engine: Callable[..., Run]) -> None:
    run = engine({"worker 0": "worker"}, when_ready=signal_self(signal.SIGTERM))
    assert (run.exit_code, run.errors) == (0, [])


@pytest.mark.parametrize(("second", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_everything_at_once(
    engine: Callable[..., Run], second: int, exit_code: int
) -> None:
    children = HEALTHY | {"frontend": {"mode": "frontend", "ignore_drain": True}}
    run = engine(children, when_ready=signal_self(signal.SIGTERM, second))
    assert run.exit_code == exit_code
    assert [died["cause"] for died in run.events("engine_died")] == [
        "the server was told to end at once"
    ]
    assert run.end_seconds < END_LIMIT_S


def test_a_third_signal_waits_for_nobody(engine: Callable[..., Run]) -> None:
    deaf = {"mode": "frontend", "ignore_drain": True, "ignore_death": True}
    run = engine(
        HEALTHY | {"frontend": deaf}, when_ready=signal_self(*[signal.SIGTERM] * 2, signal.SIGINT)
    )
    assert run.exit_code == 130
    assert run.end_seconds < FAREWELL_S


def test_a_frontend_that_fails_while_draining_is_reported(engine: Callable[..., Run]) -> None:
    children = HEALTHY | {"frontend": {"mode": "frontend", "drain_status": 3}}
    run = engine(children, when_ready=signal_self(signal.SIGTERM))
    assert run.exit_code == 1
    assert run.errors[0].endswith(") ended with exit status 3; the engine ends")


def test_a_worker_that_dies_while_draining_is_reported(engine: Callable[..., Run]) -> None:
    children = HEALTHY | {"frontend": {"mode": "frontend", "ignore_drain": True}}

    def when_ready(run: Run) -> None:
        signal_self(signal.SIGTERM)(run)
        kill("worker 0", signal.SIGKILL)(run)

    run = engine(children, when_ready=when_ready)
    assert run.exit_code == 1
    assert run.errors[0].startswith("worker 0 (pid ")
    assert len(run.events("engine_died")) == 1


def test_an_exception_in_a_callback_leaves_no_process(engine: Callable[..., Run]) -> None:
    def when_ready(run: Run) -> None:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        engine(HEALTHY, when_ready=when_ready)
    assert psutil.Process().children(recursive=True) == []


# Among other nodes.


class FakeGroup(SingleNode):
    """The other nodes as a script. `calls` is what they were told."""

    def __init__(self, node_rank: int) -> None:
        super().__init__()
        self.site = Site(nnodes=2, node_rank=node_rank)
        self.script: list[GroupEvent] = []
        self.calls: list[tuple[Any, ...]] = []
        self.others_ready = True

    def events(self) -> list[GroupEvent]:
        found, self.script = self.script, []
        return found

    def said(self, process: str, status: ChildStatus) -> None:
        if isinstance(status, Ready):
            self.calls.append(("ready", process))

    def workers_ready(self) -> None:
        self.calls.append(("workers ready",))

    def failed(self, text: str, brief: str, exit_code: int) -> None:
        self.calls.append(("failed", text, brief, exit_code))

    def ask_to_drain(self, signal: str) -> bool:
        self.calls.append(("leave", signal))
        self.script.append(Stopped())
        return self.site.node_rank > 0

    def stop(self) -> None:
        self.calls.append(("stop",))


MEMBERS = {"worker 2": "worker", "worker 3": "worker"}


def test_a_dead_worker_is_told_to_the_other_nodes(engine: Callable[..., Run]) -> None:
    group = FakeGroup(1)
    run = engine(MEMBERS, when_ready=kill("worker 3", signal.SIGKILL), group=group)
    (text,) = run.errors
    name = f"worker 3 on node 1 (pid {run.infos['worker 3']['pid']}) was killed by SIGKILL"
    assert text.startswith(name)
    assert group.calls[-1] == ("failed", text, name, 1)
    assert ("workers ready",) in group.calls
    assert run.exit_code == 1


def test_a_failure_elsewhere_ends_this_node_and_its_streams(engine: Callable[..., Run]) -> None:
    group = FakeGroup(0)

    def when_ready(run: Run) -> None:
        group.script.append(Ended("worker 3 on node 1 died", "worker 3 died", 1))

    run = engine(HEALTHY, when_ready=when_ready, group=group)
    assert (run.exit_code, run.errors) == (1, ["worker 3 on node 1 died"])
    assert [death["cause"] for death in run.events("engine_died")] == ["worker 3 died"]
    assert not any(call[0] == "failed" for call in group.calls)
    assert run.end_seconds < END_LIMIT_S


def test_a_failure_elsewhere_ends_the_start(engine: Callable[..., Run]) -> None:
    group = FakeGroup(1)

    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        group.script = [Ended("node 0: no such file", "the start failed", 2)]

    run = engine({"worker 2": "hang"}, on_status=on_status, group=group)
    assert (run.exit_code, run.errors) == (2, ["node 0: no such file"])


def test_node_0_waits_for_the_other_nodes_and_takes_their_statuses(
    engine: Callable[..., Run],
) -> None:
    """No progress here is no reason to give up while others make some."""
    group = FakeGroup(0)
    group.others_ready = False
    heard: list[str] = []

    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        heard.append(name)
        own_ready = ("workers ready",) in group.calls
        assert group.others_ready or run.events("engine_ready") == []
        if len(heard) < 20:
            group.script = [Heard("worker 3", StartPhase("import", 1.0))]
        elif own_ready:
            group.others_ready = True

    run = engine(HEALTHY, on_status=on_status, when_ready=signal_self(signal.SIGTERM), group=group)
    assert run.exit_code == 0
    assert heard.count("worker 3") > 1
    assert len(run.events("engine_ready")) == 1


def test_only_node_0_keeps_the_deadline_of_the_start(engine: Callable[..., Run]) -> None:
    group = FakeGroup(1)
    begin_s = time.monotonic()

    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        late = time.monotonic() - begin_s > 2.0
        group.script = [Ended("enough", "enough", 1) if late else Heard("worker 0", status)]

    run = engine({"worker 2": "hang"}, on_status=on_status, startup_timeout_s=1.0, group=group)
    assert run.errors == ["enough"]


def test_a_late_start_names_the_workers_of_other_nodes(engine: Callable[..., Run]) -> None:
    group = FakeGroup(0)
    group.others_ready = False
    group.waiting_for = lambda: ["worker 3 on node 1: last heard: nothing"]  # type: ignore[method-assign]
    run = engine(HEALTHY, startup_timeout_s=1.0, group=group)
    (text,) = run.errors
    assert "worker 3 on node 1: last heard: nothing" in text
    assert group.calls[-1][:2] == ("failed", text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_another_node_drains_through_node_0(
    engine: Callable[..., Run], number: int
) -> None:
    group = FakeGroup(1)
    run = engine(MEMBERS, when_ready=signal_self(number), group=group)
    assert group.calls[-1] == ("leave", signal.Signals(number).name)
    assert (run.exit_code, run.errors) == (0, [])


def test_node_0_drains_when_another_node_is_asked_to_end(engine: Callable[..., Run]) -> None:
    group = FakeGroup(0)

    def when_ready(run: Run) -> None:
        group.script.append(DrainAsked("node 1 got SIGTERM"))

    run = engine(HEALTHY, when_ready=when_ready, group=group)
    assert (run.exit_code, run.errors) == (0, [])
    assert len(run.events("drain")) == 1
    assert group.calls[-1] == ("stop",)


def test_a_blamed_worker_of_another_node_is_left_to_that_node(
    engine: Callable[..., Run], tmp_path: Path
) -> None:
    """It knows how its worker ended; that its word comes after the complaint is no matter."""
    group = FakeGroup(0)
    trigger = tmp_path / "trigger"
    os.mkfifo(trigger)
    echo = {"mode": "echo_then_hang", "trigger": str(trigger), "blames": ["worker 3"]}

    def on_status(run: Run, name: str, status: ChildStatus) -> None:
        if isinstance(status, Failed):
            group.script.append(Ended("worker 3 on node 1 was killed", "worker 3 died", 1))

    run = engine(
        HEALTHY | {"worker 0": echo},
        when_ready=lambda run: trigger.write_text("now\n") and None,
        on_status=on_status,
        group=group,
    )
    assert run.errors == ["worker 3 on node 1 was killed"]


def test_a_second_signal_ends_all_nodes_at_once(engine: Callable[..., Run]) -> None:
    group = FakeGroup(0)
    children = HEALTHY | {"frontend": {"mode": "frontend", "ignore_drain": True}}
    run = engine(children, when_ready=signal_self(signal.SIGTERM, signal.SIGTERM), group=group)
    assert run.exit_code == 143
    text = "node 0 was told to end at once, by SIGTERM"
    assert group.calls[-1] == ("failed", text, "node 0 was stopped", 143)


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
