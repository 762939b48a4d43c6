"""The supervisor with small real children: how they start, and how they are asked to end."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from core.cluster.processes.signals import OwnSignals
from core.cluster.processes.supervisor import FAREWELL_S
from core.interfaces.control import ChildStatus, Progress, Ready, StartPhase
from tests.support.supervised import END_LIMIT_S, HEALTHY, Run, kill, signal_self

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
