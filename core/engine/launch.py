"""How a step's launch overlaps with the host: a thread on CPUs, the stream on GPUs.

Both keep order: a step runs when the one before it is done.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from core.engine.runner import ModelRunner
from core.interfaces.messages import StepPlan, StepResult

Wait = Callable[[], StepResult]  # blocks until the step's tokens are on the host


class StepLauncher(Protocol):
    """Starts steps; the returned function waits for the result."""

    def launch(self, plan: StepPlan) -> Wait: ...


class ThreadLauncher:
    """Runs steps in one thread of their own, so that the scheduler works meanwhile."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")

    def launch(self, plan: StepPlan) -> Wait:
        return self._thread.submit(self._run, plan).result

    def _run(self, plan: StepPlan) -> StepResult:
        return self._runner.launch(plan).to_host()


class StreamLauncher:
    """Enqueues steps on the device's stream.

    The tokens are copied right behind their step, so that waiting for them does not wait for the
    steps launched since.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def launch(self, plan: StepPlan) -> Wait:
        pending = self._runner.launch(plan).copy_async()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> StepResult:
            done.synchronize()
            return pending.to_host()

        return wait


def select_launcher(runner: ModelRunner, device: torch.device) -> StepLauncher:
    """The launcher that overlaps best on a device."""
    return StreamLauncher(runner) if device.type == "cuda" else ThreadLauncher(runner)
