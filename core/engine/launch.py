"""Where torch is called from, and how a step's launch overlaps with the host.

On a CPU one thread does all the computing while the scheduler works in another; on a GPU the
stream does. Either keeps order: a step runs when the one before it is done.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from core.engine.runner import ModelRunner
from core.interfaces.messages import StepPlan, StepResult

T = TypeVar("T")
Wait = Callable[[], StepResult]  # blocks until the step's tokens are on the host


class Launcher(Protocol):
    """Builds a runner and starts its steps. `launch` returns a function that waits for the
    result; work handed over earlier is done first."""

    def run(self, work: Callable[[], T]) -> T:
        """Do something where steps are run; blocks."""
        ...

    def launch(self, runner: ModelRunner, plan: StepPlan) -> Wait: ...


class ThreadLauncher:
    """Runs steps in the one thread that computes, so that the scheduler works meanwhile.

    Weights are loaded there too: OpenMP keeps a team for every thread that once computed, and
    where the teams together outnumber the cores their members sleep at every barrier instead of
    spinning (a decode step of SmolLM2 on two cores took 42 ms instead of 23).
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    def run(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def launch(self, runner: ModelRunner, plan: StepPlan) -> Wait:
        return self._thread.submit(lambda: runner.launch(plan).to_host()).result


class StreamLauncher:
    """Enqueues steps on the device's stream.

    The tokens are copied right behind their step, so that waiting for them does not wait for the
    steps launched since.
    """

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def launch(self, runner: ModelRunner, plan: StepPlan) -> Wait:
        pending = runner.launch(plan).copy_async()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> StepResult:
            done.synchronize()
            return pending.to_host()

        return wait


def select_launcher(device: torch.device) -> Launcher:
    """The launcher that overlaps best on a device."""
    return StreamLauncher() if device.type == "cuda" else ThreadLauncher()


class StepLauncher:
    """Starts the steps of one runner."""

    def __init__(self, launcher: Launcher, runner: ModelRunner) -> None:
        self._launcher = launcher
        self._runner = runner

    def launch(self, plan: StepPlan) -> Wait:
        return self._launcher.launch(self._runner, plan)
