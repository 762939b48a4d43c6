"""Time of one scheduler step (next_batch and commit) with a no-op model; prints JSON.

    python benchmarks/scheduler_step.py [--steps 400]

"steady": the same requests decode in every step, as in the bound. "churn": answers have random
lengths and each one that ends is replaced at once, so that every step also ends, admits and
prefills some requests (and the prefix cache takes their pages). The prefix cache is on. `ratio` is
the median (wall clock) over the bound; the CPU times leave out what other processes took.
"""

import argparse
import gc
import json
import random
import statistics
import time

from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import Generate, SamplingParams, ScheduledStep, StepResult
from core.settings.config import EngineConfig

BOUND_MS = {256: 0.2, 1024: 0.8}
PROMPT_TOKENS = 128
MEAN_ANSWER_TOKENS = 200  # in "churn"
EOS_ID = 2


class Load:
    """Keeps `num_running` requests running in a scheduler whose pool has room for all."""

    def __init__(self, num_running: int, page_size: int, *, churn: bool, num_steps: int) -> None:
        self.rng = random.Random(0)
        self.churn = churn
        self.max_tokens = num_steps + 100
        self.num_sent = 0
        self.num_ended = 0
        pages_each = -(-(PROMPT_TOKENS + self.max_tokens + 64) // page_size)
        self.scheduler = Scheduler(
            EngineConfig(
                page_size=page_size,
                max_running_requests=num_running,
                max_prefill_tokens=num_running * PROMPT_TOKENS,
            ),
            num_pages=1 + num_running * pages_each,
            max_model_len=1 << 20,
            eos_ids=[EOS_ID],
        )
        self.send(num_running)

    def send(self, count: int) -> None:
        """Add requests with prompts of their own."""
        messages = []
        for _ in range(count):
            self.num_sent += 1
            answer = self.rng.randint(1, 2 * MEAN_ANSWER_TOKENS) if self.churn else self.max_tokens
            messages.append(
                Generate(
                    request_id=f"request-{self.num_sent:012d}",
                    prompt_ids=[self.rng.randrange(3, 100_000) for _ in range(PROMPT_TOKENS)],
                    sampling=SamplingParams(max_tokens=answer),
                )
            )
        assert not self.scheduler.admit(messages)

    def replace(self, num_ended: int) -> None:
        """Send as many requests as have ended."""
        self.num_ended += num_ended
        self.send(num_ended)

    def result(self, plan: ScheduledStep) -> StepResult:
        """A model that takes no time: an unlikely token for each row that samples."""
        return StepResult(
            [self.rng.randrange(3, 100_000) for _ in range(sum(plan.samples))], {}, {}
        )


def measure(num_running: int, page_size: int, *, churn: bool, num_steps: int) -> dict[str, object]:
    """Seconds of each overlapped step, as statistics in milliseconds."""
    load = Load(num_running, page_size, churn=churn, num_steps=num_steps)
    scheduler = load.scheduler
    previous = scheduler.next_batch()
    assert previous is not None
    result = load.result(previous)
    warm_up = 20
    wall_ms, cpu_ms = [], []
    gc.collect()
    gc.freeze()  # what the other cases left is not scanned again
    for _ in range(warm_up + num_steps):
        wall, cpu = time.perf_counter(), time.thread_time()
        plan = scheduler.next_batch()
        outputs = scheduler.commit(previous, result)
        cpu_ms.append((time.thread_time() - cpu) * 1e3)
        wall_ms.append((time.perf_counter() - wall) * 1e3)
        assert plan is not None
        load.replace(sum(output.finish_reason is not None for output in outputs))
        previous, result = plan, load.result(plan)
    gc.unfreeze()
    median, p99 = quantiles(wall_ms[warm_up:])
    cpu_median, cpu_p99 = quantiles(cpu_ms[warm_up:])
    return {
        "load": "churn" if churn else "steady",
        "num_running": num_running,
        "page_size": page_size,
        "median_ms": median,
        "p99_ms": p99,
        "cpu_median_ms": cpu_median,
        "cpu_p99_ms": cpu_p99,
        "us_per_request": round(median * 1e3 / num_running, 3),
        "bound_ms": BOUND_MS[num_running],
        "ratio": round(median / BOUND_MS[num_running], 3),
        "ended_per_step": round(load.num_ended / (warm_up + num_steps), 2),
    }


def quantiles(values: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    return (
        round(statistics.median(values), 4),
        round(statistics.quantiles(values, n=100)[98], 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400, help="measured steps of each case")
    steps = parser.parse_args().steps
    gc.set_threshold(20_000, 20, 50)  # what a server process sets
    cases = [
        measure(num_running, page_size, churn=churn, num_steps=steps)
        for churn in (False, True)
        for page_size in (16, 1)
        for num_running in BOUND_MS
    ]
    print(json.dumps({"benchmark": "scheduler_step", "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
