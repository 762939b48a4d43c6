"""Steps are run in order beside the host, and counted for those who watch."""

import threading
import time

import pytest
import torch

from core.engine.run.executor import StepExecutor, ThreadExecutor, select_executor
from core.engine.run.loop import IDLE_STEP
from core.engine.schedule.pace import Pace
from core.engine.step.progress import Progress
from core.interfaces.messages import AgreedStep, StepFacts, StepResult

STEP = AgreedStep(IDLE_STEP, StepFacts([1], [1], [0], False))


class Pending:
    def __init__(self, gate, token):
        self._gate, self._token = gate, token

    def to_host(self):
        assert self._gate.wait(20)
        if self._token < 0:
            raise ValueError("the step failed")
        return StepResult([self._token], {}, {})


class Runner:
    """Step i ends when `gates[i]` is set."""

    def __init__(self, tokens):
        self.progress = Progress()
        self.gates = [threading.Event() for _ in tokens]
        self._tokens = list(tokens)
        self._next = 0

    def launch(self, step):
        assert step is STEP
        index, self._next = self._next, self._next + 1
        return Pending(self.gates[index], self._tokens[index])


def test_a_cpu_computes_in_a_thread_of_its_own():
    executor = select_executor(torch.device("cpu"))
    assert isinstance(executor, ThreadExecutor)
    threads = {executor.run(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_steps_are_counted_when_they_end_not_when_somebody_waits():
    runner = Runner([5, 6, 7])
    executor = ThreadExecutor()
    steps = StepExecutor(executor, runner)
    assert (steps.launched, steps.finished) == (0, 0)
    waits = [steps.launch(STEP) for _ in range(3)]
    assert (steps.launched, steps.finished) == (3, 0)
    runner.gates[0].set()
    assert waits[0]().token_ids == [5]
    assert (steps.launched, steps.finished) == (3, 1)
    runner.gates[1].set()
    runner.gates[2].set()
    executor.run(lambda: None)  # behind all of them; nobody has waited for the last two
    assert (steps.launched, steps.finished) == (3, 3)
    assert [wait().token_ids for wait in waits] == [[5], [6], [7]]


def test_a_step_that_fails_tells_the_one_who_waits_and_is_done():
    runner = Runner([-1])
    executor = ThreadExecutor()
    steps = StepExecutor(executor, runner)
    wait = steps.launch(STEP)
    runner.gates[0].set()
    with pytest.raises(ValueError, match="the step failed"):
        wait()
    executor.run(lambda: None)
    assert (steps.launched, steps.finished) == (1, 1)


class Waited:
    """A launched step that can't be asked, only waited for."""

    def done(self):
        raise AssertionError("the device was asked")

    def result(self):
        return StepResult([1], {}, {})


def test_launching_and_waiting_asks_no_device_which_steps_are_done():
    executor = ThreadExecutor()
    executor.launch = lambda runner, step: Waited()
    steps = StepExecutor(executor, Runner([]))
    first = steps.launch(STEP)
    second = steps.launch(STEP)
    assert second().token_ids == [1]  # so is the one before it
    assert (steps.launched, steps.finished) == (2, 2)
    assert first().token_ids == [1]
    steps.launch(STEP)
    with pytest.raises(AssertionError, match="the device was asked"):
        _ = steps.finished


def test_beats_say_what_is_done_and_what_to_expect():
    runner = Runner([5, 6])
    steps = StepExecutor(ThreadExecutor(), runner)
    steps.pace = Pace(token_s=2.0)
    assert steps.heartbeat().expected_s == 0.0
    waits = [steps.launch(STEP) for _ in range(2)]
    runner.progress.pieces = 3
    heartbeat = steps.heartbeat()
    assert (heartbeat.launched, heartbeat.finished, heartbeat.pieces, heartbeat.expected_s) == (
        2,
        0,
        3,
        2.0,
    )
    for gate in runner.gates:
        gate.set()
    assert [wait().token_ids for wait in waits] == [[5], [6]]
    heartbeat = steps.heartbeat()
    assert (heartbeat.launched, heartbeat.finished, heartbeat.expected_s) == (2, 2, 0.0)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
def test_cpu_time_is_that_of_the_thread_that_computes():
    executor = ThreadExecutor()
    before = executor.cpu_s()
    begin = time.thread_time()
    while time.thread_time() - begin < 0.05:  # here, not there
        pass
    assert executor.cpu_s() - before < 0.02

    def spin():
        begin = time.thread_time()
        while time.thread_time() - begin < 0.05:
            pass

    executor.run(spin)
    assert executor.cpu_s() - before >= 0.05
