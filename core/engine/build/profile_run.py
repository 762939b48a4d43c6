"""What happens on a GPU between loading weights and serving: kernels are compiled, and the largest
steps run once, so that what they need is known before the KV pool takes the rest.

Knows nothing of how runners are built or of what the pool is for.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.disk.cache import cache_dir
from core.disk.progress import OnProgress
from core.engine.build.memory import GIB, GRAPH_BYTES, HeldMemory
from core.engine.run.executor import StepExecutor, StreamExecutor
from core.engine.run.lockstep import rank_facts, settle
from core.engine.run.loop import warm_up
from core.engine.run.runner import ModelRunner
from core.engine.step.profile_steps import (
    COSTLIEST,
    captured_prefill,
    kernel_steps,
    largest_decode,
    largest_prefills,
)
from core.errors import ResourceError
from core.interfaces.messages import AgreedStep, ScheduledStep
from core.settings.config import EngineConfig

OnPhase = Callable[[str, float], None]  # name of a phase that ended, seconds
COMPILE_TASK = "compile kernels"


class StartPhases:
    """Seconds between the ends of phases."""

    def __init__(self, on_phase: OnPhase) -> None:
        self._on_phase = on_phase
        self._start = time.monotonic()

    def end(self, name: str) -> None:
        """The phase that began when the last one ended is over."""
        now = time.monotonic()
        self._on_phase(name, now - self._start)
        self._start = now


def keep_kernels(chosen: str | None) -> None:
    """Have compiled kernels kept between starts: in the folder that is chosen, else where Triton's
    own variable says, else in the user's cache. Before the first kernel is compiled."""
    from core.gpu_tools import compile_ahead

    if chosen is not None:
        compile_ahead.keep_kernels_in(Path(chosen).expanduser())
    elif compile_ahead.CACHE_VARIABLE not in os.environ:
        compile_ahead.keep_kernels_in(cache_dir("kernels"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRun:
    """Steps of made-up requests on a runner whose pool is a scratch page.

    `rehearses`: steps may be run with kernels left out. `build_runner` makes such a runner, of the
    whole model or of one that is shortened; it is dropped at the end. Every rank runs the same
    steps.
    """

    engine: EngineConfig
    max_model_len: int
    device: torch.device
    num_dp: int
    rehearses: bool
    build_runner: Callable[[bool], ModelRunner]  # whether shortened
    phases: StartPhases
    on_progress: OnProgress

    def run(self) -> HeldMemory:
        """Compile, then run the largest steps. Leaves the memory that they took with torch, for
        steps to come. Raises ResourceError where they need more than there is."""
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated(self.device)
        if self.rehearses:
            self._compile()
        runner = self.build_runner(False)
        state = torch.cuda.memory_allocated(self.device) - weights
        self.phases.end(COMPILE_TASK)
        try:
            graphs = self._decode(runner)
            self._largest(runner)
        except torch.OutOfMemoryError as error:
            total = torch.cuda.mem_get_info(self.device)[1]
            raise ResourceError(
                f"the largest steps don't fit in the memory of {self.device}: of "
                f"{total / GIB:.2f} GiB weights take {weights / GIB:.2f}, slots and buffers "
                f"{state / GIB:.2f}; lower engine.max_prefill_tokens or "
                "engine.max_running_requests, or use more ranks (parallel.tp)"
            ) from error
        activations = torch.cuda.memory_reserved(self.device) - weights - state
        self.phases.end("try largest steps")
        return HeldMemory(weights=weights, state=state, activations=activations, graphs=graphs)

    def _compile(self) -> None:
        from core.gpu_tools.compile_ahead import rehearsal

        def on_compiled(done: int, total: int) -> None:
            self.on_progress(COMPILE_TASK, done, total, "kernels")

        with rehearsal(self.device, on_compiled):
            runner = self.build_runner(True)
            steps = runner.steps
            made_up = kernel_steps(self.engine, self.max_model_len, decodes=steps.num_captures == 0)
            steps.rehearse()
            for scheduled in made_up:
                runner.launch(self._agreed(scheduled))
        torch.cuda.synchronize(self.device)

    def _decode(self, runner: ModelRunner) -> int:
        """Run the largest steps that may be captured; about the bytes that this will take: all
        share the memory of the largest."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        steps = [largest_decode(self.engine, self.max_model_len)]
        if most_rows := runner.steps.most_prompt_rows:
            steps.append(captured_prefill(self.engine, self.max_model_len, most_rows))
        self._launch(runner, steps)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        num_captures = runner.steps.num_captures
        return peak + num_captures * GRAPH_BYTES if num_captures else 0

    def _largest(self, runner: ModelRunner) -> None:
        engine, longest = self.engine, self.max_model_len
        self._launch(runner, largest_prefills(engine, longest, COSTLIEST))
        self._launch(runner, [largest_decode(engine, longest, COSTLIEST)])

    def _launch(self, runner: ModelRunner, steps: Sequence[ScheduledStep]) -> None:
        warm_up(StepExecutor(StreamExecutor(), runner), steps, self.num_dp)

    def _agreed(self, scheduled: ScheduledStep) -> AgreedStep:
        return AgreedStep(
            scheduled, settle([rank_facts(0, scheduled, busy=True)] * self.num_dp).facts
        )
