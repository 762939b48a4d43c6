"""The supervisor of one node among others, which a fake group stands for."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.cluster.processes.group import DrainAsked, Ended, GroupEvent, Heard, SingleNode, Stopped
from core.interfaces.control import ChildStatus, Failed, Ready, StartPhase
from core.interfaces.launcher import Site
from tests.support.supervised import END_LIMIT_S, HEALTHY, Run, kill, signal_self


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


def test_a_node_whose_processes_all_ended_still_says_why(engine: Callable[..., Run]) -> None:
    """Its only worker falls as ranks do whose peer died; a likelier cause may come meanwhile."""
    group = FakeGroup(1)
    run = engine({"worker 3": "worker"}, when_ready=kill("worker 3", signal.SIGABRT), group=group)
    (text,) = run.errors
    assert "worker 3 on node 1" in text
    assert "SIGABRT" in text
    assert group.calls[-1][:2] == ("failed", text)
    assert run.exit_code == 1
