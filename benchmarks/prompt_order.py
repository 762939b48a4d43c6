"""Which order of prompts serves short requests soon and starves nobody: a simulation; prints JSON.

    python -m benchmarks.prompt_order

The real scheduler over a made-up machine, whose steps take what a pace says (of SmolLM2 on two CPU
cores). Loads: "long": 60 prompts of 1,990 tokens at once, and short ones (20 tokens) that come by
chance, one a second; from two clients or from one. "flood": 8 long prompts among short ones that
alone would take nine tenths of the machine. For each order: time to first token of the short ones
over that of an idle machine, of the long ones in seconds, and the seconds until the last long one
had its answer.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.engine.run.loop import LONG_STEP_S
from core.engine.schedule.pace import Pace
from core.engine.schedule.prompt_budget import PromptBudget
from core.engine.schedule.prompt_order import MayEnter, OldestAndShortest, PromptOrder, by_age
from core.engine.schedule.request import Request
from core.engine.schedule.scheduler import Scheduler
from core.engine.schedule.waiting import WaitingQueue
from core.interfaces.messages import (
    Generate,
    SamplingParams,
    ScheduledStep,
    StepFacts,
    StepResult,
)
from core.settings.config import EngineConfig

PACE = Pace(token_s=1 / 900, pair_s=0.4e-6, logprob_s=5e-3, base_s=0.02)
LONG_TOKENS, SHORT_TOKENS, ANSWER_TOKENS = 1990, 20, 16
AGING_TOKENS_PER_S = 50.0  # that a second in the queue is worth


class OldestFirst:
    """Implements PromptOrder: as they come."""

    def passes(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        budget: PromptBudget,
        may_enter: MayEnter,
    ) -> Iterator[Iterator[Request]]:
        yield by_age(prefilling, waiting)


class ShortestWithAging:
    """Implements PromptOrder: the least to compute first, less what waiting is worth."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine

    def passes(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        budget: PromptBudget,
        may_enter: MayEnter,
    ) -> Iterator[Iterator[Request]]:
        now, sent_s = self._machine.now_s, self._machine.sent_s

        def score(request: Request) -> float:
            waited_s = now - sent_s[request.request_id]
            return request.tokens_left - AGING_TOKENS_PER_S * waited_s

        yield iter(sorted([*prefilling, *waiting.by_age()], key=score))


class DeficitRoundRobin:
    """Implements PromptOrder: each client that has work gets an equal share of every step, and
    what one leaves goes to the next."""

    def __init__(self) -> None:
        self._turn = 0

    def passes(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        budget: PromptBudget,
        may_enter: MayEnter,
    ) -> Iterator[Iterator[Request]]:
        by_client: dict[str, list[Request]] = {}
        for request in by_age(prefilling, waiting):
            by_client.setdefault(request.request_id.split("/")[0], []).append(request)
        self._turn += 1
        clients = sorted(by_client)
        clients = clients[self._turn % len(clients) :] + clients[: self._turn % len(clients)]
        tokens, seconds = budget.tokens // len(clients), budget.seconds / len(clients)
        for left in range(len(clients) - 1, -1, -1):
            budget.hold_back(left * tokens, left * seconds)
            yield iter(by_client[clients[len(clients) - 1 - left]])
            budget.hold_back(-left * tokens, -left * seconds)
        yield by_age(prefilling, waiting)


@dataclass(slots=True)
class Load:
    """Requests by when they are sent (s)."""

    requests: list[tuple[float, str, int]] = field(default_factory=list)  # id, prompt tokens

    def add(self, at_s: float, client: str, kind: str, tokens: int) -> None:
        self.requests.append((at_s, f"{client}/{kind}/{len(self.requests)}", tokens))


class Machine:
    """Runs a load; steps take what the pace says, and the loop's order of planning and waiting."""

    def __init__(self, step_s: float) -> None:
        self.now_s = 0.0
        self.sent_s: dict[str, float] = {}
        self.first_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        self._config = EngineConfig(page_size=16, cpu_step_s=step_s)

    def run(self, order: PromptOrder, load: Load) -> None:
        rng = random.Random(1)
        scheduler = Scheduler(
            self._config,
            num_pages=12_000,
            max_model_len=8192,
            eos_ids=[],
            pace=PACE,
            order=order,
            clock=lambda: self.now_s,
        )
        coming = sorted(load.requests)
        running: ScheduledStep | None = None  # launched, ends at `ends_s`
        ends_s = 0.0
        while coming or scheduler.has_work:
            if running is not None and (
                self._seconds(running) >= LONG_STEP_S or scheduler.has_prompts_for(LONG_STEP_S)
            ):
                self._end(scheduler, running, ends_s, rng)
                running = None
            while coming and coming[0][0] <= self.now_s:
                at_s, request_id, tokens = coming.pop(0)
                prompt = [rng.randrange(3, 40_000) for _ in range(tokens)]
                sampling = SamplingParams(max_tokens=ANSWER_TOKENS)
                self.sent_s[request_id] = at_s
                scheduler.admit([Generate(request_id, prompt, sampling)])
            plan = scheduler.next_batch()
            begins_s = max(self.now_s, ends_s)
            if running is not None:
                self._end(scheduler, running, ends_s, rng)
            if plan is not None:
                ends_s = begins_s + self._seconds(plan)
            elif running is None and coming:
                self.now_s = max(self.now_s, coming[0][0])
            running = plan

    def _end(
        self, scheduler: Scheduler, plan: ScheduledStep, at_s: float, rng: random.Random
    ) -> None:
        self.now_s = max(self.now_s, at_s)
        ids = [rng.randrange(3, 40_000) for _ in range(sum(plan.samples))]
        for output in scheduler.commit(plan, StepResult(ids, {}, {})):
            self.first_s.setdefault(output.request_id, self.now_s)
            if output.finish_reason is not None:
                self.ended_s[output.request_id] = self.now_s

    @staticmethod
    def _seconds(plan: ScheduledStep) -> float:
        facts = StepFacts([sum(plan.lengths)], [sum(plan.samples)], [0], True)
        return PACE.step_s(plan, facts)

    def first_token_s(self, kind: str) -> list[float]:
        """Of the requests of a kind, in order of size."""
        return sorted(
            first - self.sent_s[request_id]
            for request_id, first in self.first_s.items()
            if f"/{kind}/" in request_id
        )


def loads() -> dict[str, Load]:
    """The loads of the module's text."""
    rng = random.Random(0)
    two, one, flood = Load(), Load(), Load()
    for load, client in ((two, "batch"), (one, "all")):
        for _ in range(60):
            load.add(0.0, client, "long", LONG_TOKENS)
    at_s = 1.0
    while at_s < 120:
        two.add(at_s, "people", "short", SHORT_TOKENS)
        one.add(at_s, "all", "short", SHORT_TOKENS)
        at_s += rng.expovariate(1.0)
    for _ in range(8):
        flood.add(0.0, "batch", "long", LONG_TOKENS)
    at_s = 0.0
    while at_s < 120:
        flood.add(at_s, "people", "short", 200)
        at_s += rng.expovariate(0.9 / (PACE.prompt_s(0, 200, False) + 0.03))
    return {"long, two clients": two, "long, one client": one, "flood of short": flood}


def measure(order: str, step_s: float, load: Load) -> dict[str, Any]:
    """One row."""
    machine = Machine(step_s)
    orders: dict[str, PromptOrder] = {
        "oldest first": OldestFirst(),
        "shortest first, with aging": ShortestWithAging(machine),
        "deficit round robin by client": DeficitRoundRobin(),
        "oldest and shortest": OldestAndShortest(),
    }
    machine.run(orders[order], load)
    short, long = machine.first_token_s("short"), machine.first_token_s("long")
    idle = Machine(step_s)
    alone = Load()
    alone.add(0.0, "one", "short", load.requests[-1][2])
    idle.run(OldestFirst(), alone)
    (idle_s,) = idle.first_token_s("short")
    long_ended = [at for name, at in machine.ended_s.items() if "/long/" in name]
    return {
        "order": order,
        "step_s": step_s,
        "short_p50_over_idle": round(statistics.median(short) / idle_s, 1),
        "short_p99_over_idle": round(statistics.quantiles(short, n=100)[98] / idle_s, 1),
        "short_p99_s": round(statistics.quantiles(short, n=100)[98], 2),
        "long_mean_s": round(statistics.mean(long), 1),
        "long_worst_s": round(long[-1], 1),
        "long_done_s": round(max(long_ended), 1),
        "all_done_s": round(max(machine.ended_s.values()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    rows = []
    for name, load in loads().items():
        for order, step_s in (
            ("oldest first", 0.0),
            ("oldest first", 0.25),
            ("oldest first", 0.3),
            ("shortest first, with aging", 0.25),
            ("deficit round robin by client", 0.25),
            ("oldest and shortest", 0.25),
            ("oldest and shortest", 0.3),
            ("oldest and shortest", 0.4),
            ("oldest and shortest", 1.0),
        ):
            rows.append({"load": name, **measure(order, step_s, load)})
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
