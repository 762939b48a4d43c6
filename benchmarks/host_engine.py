"""Host time of a decode step with a real model, and what the device idles between steps.

    python -m benchmarks.host_engine MODEL_DIR [--batch 256] [--context 1024] [--steps 100]

Made-up weights. Prints one JSON line. `busy_ms`: what the host does in a turn of the engine's loop
(scheduling, launching, reading tokens), without the time in which it waits for the running step;
of it, `plan_ms`: the scheduler's part; `launch_ms`: handing the step to the device; `read_ms`:
reading the tokens of one that is done. Medians over the steps, of `plan_ms` the mean.
`idle_us`: between two replayed steps on the device, from a trace of 20 more steps; null on a CPU.
The step hides the host's work where `wait_ms` is above zero.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_profile
from benchmarks.gpu_engine import configuration, parse_alone, shape_of
from benchmarks.host_step import timed
from core.engine.local.in_process import build_in_process, offline_in_process
from core.interfaces.messages import SamplingParams

TRACED_STEPS = 20
FIRST_STEPS = 8  # of the decode phase, not counted


class PolledExecutor:
    """Another executor whose steps write down how long they were waited for."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.waited_s: list[float] = []
        self.launched_s: list[float] = []
        self.read_s: list[float] = []

    def clear(self) -> None:
        """Forget the steps so far."""
        for times in (self.waited_s, self.launched_s, self.read_s):
            times.clear()

    def run(self, work: Callable[[], Any]) -> Any:
        return self._executor.run(work)

    def launch(self, runner: Any, step: Any) -> "PolledStep":
        begin = time.perf_counter()
        launched = self._executor.launch(runner, step)
        self.launched_s.append(time.perf_counter() - begin)
        return PolledStep(launched, self.waited_s, self.read_s)

    def cpu_s(self) -> float:
        return 0.0


class PolledStep:
    """A launched step. Waiting ends with the step; reading its tokens is the host's work."""

    def __init__(self, step: Any, waited_s: list[float], read_s: list[float]) -> None:
        self._step = step
        self._waited_s, self._read_s = waited_s, read_s

    def done(self) -> bool:
        return bool(self._step.done())

    def result(self) -> Any:
        begin = time.perf_counter()
        while not self._step.done():
            time.sleep(0)
        end = time.perf_counter()
        self._waited_s.append(end - begin)
        result = self._step.result()
        self._read_s.append(time.perf_counter() - end)
        return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the engine, fill it with `--batch` requests, and time turns of its loop."""
    shape, name = shape_of(Path(arguments.model_dir))
    lone = build_in_process(configuration(arguments, shape, name))
    polled = PolledExecutor(lone.engine.executor._executor)
    lone.engine.executor._executor = polled
    engine = offline_in_process(lone)
    planned_ms: list[float] = []
    timed(engine.scheduler, "next_batch", planned_ms)
    timed(engine.scheduler, "commit", planned_ms)
    new_tokens = arguments.steps + TRACED_STEPS + FIRST_STEPS + 8
    # Early requests decode while late prompts are computed: they must outlast those.
    params = SamplingParams(max_tokens=new_tokens + arguments.osl, temperature=0.0, ignore_eos=True)
    prompt = [7 + index % 80 for index in range(arguments.isl)]
    names = [engine.submit(prompt, params) for _ in range(arguments.batch)]
    begun: set[str] = set()
    while len(begun) < len(names):
        begun |= {output.request_id for output in engine.step()}
    for _ in range(FIRST_STEPS):
        engine.step()
    polled.clear()
    planned_ms.clear()
    turns_s = []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        engine.step()
        turns_s.append(time.perf_counter() - begin)
    busy_s = [turn - wait for turn, wait in zip(turns_s, polled.waited_s, strict=True)]
    idle_us: list[float] = []
    if lone.device.type == "cuda":
        events = gpu_profile.traced(lambda: [engine.step() for _ in range(TRACED_STEPS)])
        idle_us = gpu_profile.between_steps(events)
    return {
        "model": name,
        "batch": arguments.batch,
        "context": arguments.isl,
        "cuda_graphs": lone.engine.describe().get("cuda_graphs"),
        "turn_ms": round(median(turns_s) * 1e3, 4),
        "busy_ms": round(median(busy_s) * 1e3, 4),
        "plan_ms": round(sum(planned_ms[: 2 * arguments.steps]) / arguments.steps, 4),
        "launch_ms": round(median(polled.launched_s[: arguments.steps]) * 1e3, 4),
        "read_ms": round(median(polled.read_s[: arguments.steps]) * 1e3, 4),
        "slowest_busy_ms": round(max(busy_s) * 1e3, 4),
        "wait_ms": round(median(polled.waited_s) * 1e3, 4),
        "idle_us": round(median(idle_us), 2) if idle_us else None,
        "most_idle_us": round(max(idle_us), 2) if idle_us else None,
    }


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, and the cells that `configuration` plans for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", help="a folder with config.json")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", dest="isl", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt-steps", dest="osl", type=int, default=400, help="at most")
    arguments = parse_alone(parser, words)
    arguments.osl += arguments.steps + TRACED_STEPS
    return arguments


def main() -> None:
    print(json.dumps(measure(parsed())), flush=True)


if __name__ == "__main__":
    main()
