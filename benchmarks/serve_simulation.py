"""How a scheduler's settings serve the loads of `benchmarks.serve_http`, without a device.

    python -m benchmarks.serve_simulation [--loads ...] [--variant NAME="KEY=VALUE ..."]

The real scheduler over a made-up machine, whose steps take what Llama-3.1-8B's take on an H200.
Prints rows and a table as `serve_http` does; HTTP and text take a fixed time.
Keys of a variant are of `engine`, in JSON.
"""

import argparse
import json
import random
import sys
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import serve_http
from benchmarks.serving import report
from benchmarks.serving.arrivals import Lengths, Load, Turn
from benchmarks.serving.client import Answer, Outcome
from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import Generate, SamplingParams, ScheduledStep, StepResult
from core.settings.config import EngineConfig

VOCAB, MAX_MODEL_LEN = 128_256, 8192
# What an H200 of 141 GB settles on for this model.
DEFAULTS = {
    "device": "cuda",
    "page_size": 16,
    "max_running_requests": 512,
    "mixed_prefill_tokens": 1024,
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step costs, in seconds. Defaults: Llama-3.1-8B in bfloat16 on an H200 (decode 3.9, 6.8
    and 15.7 ms at 1, 64 and 256 requests of 1,088 tokens; 43,900 prompt tokens a second). What is
    of the host was chosen so that a run of `serve_http` there came out as measured."""

    weights_s: float = 3.7e-3  # reading every weight
    row_s: float = 1 / 46_500  # of products
    rows_base_s: float = 0.6e-3
    context_token_s: float = 131_072 / 3.9e12  # of a decode: reading its keys and values
    pair_s: float = 3.2e-10  # of a prompt's token with one before it
    base_s: float = 0.2e-3
    plan_s: float = 0.5e-3  # of the host
    replay_s: float = 0.5e-3  # of the host, to launch a captured step
    kernels_s: float = 13e-3  # to launch one kernel by kernel
    most_captured_tokens: int = 1024  # of a step with prompts
    most_captured_sequences: int = 32
    beside_s: float = 5e-3  # HTTP and text, of every token

    def launch_s(self, plan: ScheduledStep) -> float:
        """Of the host: steps with prompts are captured up to a size."""
        is_captured = len(plan.slots) == plan.num_decodes or (
            sum(plan.lengths) <= self.most_captured_tokens
            and len(plan.slots) <= self.most_captured_sequences
        )
        return self.replay_s if is_captured else self.kernels_s

    def step_s(self, plan: ScheduledStep) -> float:
        decodes = plan.num_decodes
        rows = sum(plan.lengths)
        context = sum(plan.starts[:decodes]) + decodes
        pairs = sum(
            length * (start + length / 2)
            for start, length in zip(plan.starts[decodes:], plan.lengths[decodes:], strict=True)
        )
        products_s = max(self.weights_s, self.rows_base_s + rows * self.row_s)
        return self.base_s + products_s + context * self.context_token_s + pairs * self.pair_s


class Simulation:
    """One load on one machine. Step n+1 is planned and launched while step n runs, and before step
    n's tokens are handed out, as in the engine's loop."""

    def __init__(
        self, config: EngineConfig, load: Load, machine: Machine, *, pool_tokens: int
    ) -> None:
        self._config, self._load, self._machine = config, load, machine
        self._now, self._ends_s = 0.0, 0.0  # of the clock; of the launched step
        self._rng = random.Random(1)
        self._scheduler = Scheduler(
            config,
            num_pages=pool_tokens // config.settled_page_size + 1,
            max_model_len=MAX_MODEL_LEN,
            eos_ids=[],
            clock=lambda: self._now,
            mixed_tokens=config.mixed_prefill_tokens,
        )
        # When, and which turn of which conversation.
        self._coming = sorted(
            (each.at_s, number, 0) for number, each in enumerate(load.conversations)
        )
        self._due: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}

    def run(self) -> Outcome:
        scheduler, machine, running = self._scheduler, self._machine, None
        while self._coming or scheduler.has_work:
            self._admit()
            plan = scheduler.next_batch()
            ends_s = 0.0
            if plan is not None:
                begins_s = max(self._now + machine.plan_s, self._ends_s)
                self._now += machine.plan_s + machine.launch_s(plan)
                # The device can't be done before the host has launched all of it.
                ends_s = max(begins_s + machine.step_s(plan), self._now)
            if running is not None:
                self._finish(running)
            if plan is not None:
                self._ends_s = ends_s
            elif running is None and self._coming:
                self._now = max(self._now, self._coming[0][0])
            running = plan
        answers = [self._answer(name) for name in self._due]
        return Outcome(0.0, self._now, answers, False, [], 0.0)

    def _turn(self, name: str) -> Turn:
        number, turn = map(int, name.split("/"))
        return self._load.conversations[number].turns[turn]

    def _admit(self) -> None:
        while self._coming and self._coming[0][0] <= self._now:
            at_s, number, turn = self._coming.pop(0)
            name = f"{number}/{turn}"
            each = self._turn(name)
            self._due[name], self._times[name] = at_s, []
            sampling = SamplingParams(max_tokens=each.new_tokens, ignore_eos=True)
            self._scheduler.admit([Generate(name, each.prompt, sampling)])

    def _finish(self, plan: ScheduledStep) -> None:
        self._now = max(self._now, self._ends_s)
        ids = [self._rng.randrange(3, 40_000) for _ in range(sum(plan.samples))]
        for output in self._scheduler.commit(plan, StepResult(ids, {}, {})):
            self._times[output.request_id].append(self._now)
            if output.finish_reason is not None:
                self._go_on(output.request_id)

    def _go_on(self, name: str) -> None:
        """A turn ended; the next one comes after its pause."""
        number, turn = map(int, name.split("/"))
        turns = self._load.conversations[number].turns[turn + 1 :]
        if turns:
            insort(self._coming, (self._now + turns[0].pause_s, number, turn + 1))

    def _answer(self, name: str) -> Answer:
        due = self._due[name]
        times = [at_s + self._machine.beside_s for at_s in self._times[name]]
        return Answer(due, due, times, len(times), None, self._turn(name).new_tokens, None)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load of each variant."""
    lengths = Lengths(arguments.prompt, arguments.answer, VOCAB)
    shared = serve_http.parsed(["."])
    rows = []
    for text in ["defaults=", *arguments.variant]:
        name, _, words = text.partition("=")
        pairs = (word.partition("=") for word in words.split())
        config = EngineConfig(**(DEFAULTS | {key: json.loads(value) for key, _, value in pairs}))
        for load_name in arguments.loads:
            load = serve_http.made_load(load_name, shared, lengths, arguments.peak)
            outcome = Simulation(config, load, Machine(), pool_tokens=arguments.pool_tokens).run()
            row = {"server": name, "load": load_name, "rate": round(load.rate, 3)}
            rows.append(row | report.summarise(outcome, serve_http.limits_of(shared)))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--in", dest="prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--out-tokens", dest="answer", type=int, default=128, help="of an answer")
    parser.add_argument("--peak", type=float, default=4000.0, help="output tokens a second")
    parser.add_argument("--pool-tokens", type=int, default=700_000, help="in the KV pool")
    parser.add_argument("--loads", nargs="+", default=list(serve_http.LOADS))
    parser.add_argument("--variant", action="append", default=[], metavar='NAME="KEY=JSON ..."')
    print(report.table(run(parser.parse_args(words))), file=sys.stderr)


if __name__ == "__main__":
    main()
