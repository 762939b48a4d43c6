"""Where torch is called from, and how a step's launch overlaps with the host.

On a CPU one thread does all the computing while the scheduler works in another; on a GPU the
stream does. Either keeps order: a step runs when the one before it is done.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from core.engine.run.runner import ModelRunner, PendingStep
from core.engine.schedule.pace import Pace
from core.interfaces.control import Heartbeat
from core.interfaces.messages import AgreedStep, StepResult

T = TypeVar("T")
Wait = Callable[[], StepResult]  # blocks until the step's tokens are on the host


class LaunchedStep(Protocol):
    """A step under way. A future is one."""

    def done(self) -> bool:
        """Whether it ended, well or not; does not wait."""
        ...

    def result(self) -> StepResult:
        """Blocks until the step's tokens are on the host; raises what the step raised."""
        ...


class DeviceExecutor(Protocol):
    """Builds a runner and starts its steps; work handed over earlier is done first."""

    def run(self, work: Callable[[], T]) -> T:
        """Do something where steps are run; blocks."""
        ...

    def launch(self, runner: ModelRunner, step: AgreedStep) -> LaunchedStep: ...

    def cpu_s(self) -> float:
        """CPU time of the thread that computes; always 0 where another device does. From any
        thread."""
        ...


class ThreadExecutor:
    """Runs steps in the one thread that computes, so that the scheduler works meanwhile.

    Weights are loaded there too: OpenMP keeps a team for every thread that once computed, and
    where the teams together outnumber the cores their members sleep at every barrier instead of
    spinning (a decode step of SmolLM2 on two cores took 42 ms instead of 23).
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._clock = self.run(_clock_of_thread)

    def run(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def launch(self, runner: ModelRunner, step: AgreedStep) -> LaunchedStep:
        return self._thread.submit(lambda: runner.launch(step).to_host())

    def cpu_s(self) -> float:
        return 0.0 if self._clock is None else time.clock_gettime(self._clock)


def _clock_of_thread() -> int | None:
    """The clock of the calling thread's CPU time; None where the system has none to read."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.pthread_getcpuclockid(threading.get_ident())


class _StreamStep:
    """A step on a CUDA stream: `event` comes after the copy of its tokens to `pending`."""

    def __init__(self, pending: PendingStep, event: torch.cuda.Event) -> None:
        self._pending = pending
        self._event = event

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        self._event.synchronize()
        return self._pending.to_host()


class StreamExecutor:
    """Enqueues steps on the device's stream.

    The tokens are copied right behind their step, so that waiting for them does not wait for the
    steps launched since.
    """

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def launch(self, runner: ModelRunner, step: AgreedStep) -> LaunchedStep:
        pending = runner.launch(step).copy_async()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _StreamStep(pending, event)

    def cpu_s(self) -> float:
        return 0.0  # who waits for a GPU may spin, which says nothing


def select_executor(device: torch.device) -> DeviceExecutor:
    """The executor that overlaps best on a device."""
    return StreamExecutor() if device.type == "cuda" else ThreadExecutor()


class StepExecutor:
    """Starts the steps of one runner, and counts them for those who watch whether it moves.

    `pace` says what they cost, as far as that is known; set before the first request.
    """

    def __init__(self, executor: DeviceExecutor, runner: ModelRunner) -> None:
        self.pace = Pace()
        self._executor = executor
        self._runner = runner
        self._lock = threading.Lock()  # guards what follows
        self._running: deque[LaunchedStep] = deque()
        self._expected_s: deque[float] = deque()  # of each step that began and is not done
        self._launched = 0
        self._finished = 0

    @property
    def launched(self) -> int:
        """Steps begun to be launched since the start. From any thread."""
        with self._lock:
            return self._launched

    @property
    def finished(self) -> int:
        """How many of them are done, whether or not somebody waited for them. From any thread."""
        with self._lock:
            self._count()
            return self._finished

    def heartbeat(self) -> Heartbeat:
        """How far the steps are. From any thread."""
        with self._lock:
            self._count()
            return Heartbeat(
                launched=self._launched,
                finished=self._finished,
                pieces=self._runner.progress.pieces,
                cpu_s=self._executor.cpu_s(),
                expected_s=self._expected_s[0] if self._expected_s else 0.0,
            )

    def launch(self, step: AgreedStep) -> Wait:
        expected_s = self.pace.step_s(step.scheduled, step.facts)
        with self._lock:
            self._launched += 1  # before the launch, which may be what hangs
            self._expected_s.append(expected_s)
        launched = self._executor.launch(self._runner, step)
        with self._lock:
            self._running.append(launched)
            number = self._finished + len(self._running)

        def wait() -> StepResult:
            result = launched.result()
            self._count_up_to(number)
            return result

        return wait

    def _count_up_to(self, number: int) -> None:
        """A step is done, and so are those before it: asking the device takes long."""
        with self._lock:
            while self._running and self._finished < number:
                self._end_first()

    def _count(self) -> None:
        while self._running and self._running[0].done():
            self._end_first()

    def _end_first(self) -> None:
        self._running.popleft()
        self._expected_s.popleft()
        self._finished += 1
