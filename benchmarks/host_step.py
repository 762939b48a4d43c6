"""Host time of a decode step, with a model that computes nothing: python -m benchmarks.host_step

Prints one JSON line: milliseconds a step of scheduling (mean), of launching (packing, copying,
replaying, sampling, reading back; median), and of both and all around them (median). On a GPU the
staging and the choice of tokens are captured and replayed as always; on a CPU replays do nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from core.devices.select import select_staging
from core.engine.run.executor import StepExecutor, StreamExecutor
from core.engine.run.expert_balance import NoExpertBalancer
from core.engine.run.lockstep import SoloLockstep
from core.engine.run.loop import EngineLoop, NoFollowers, RunningStep
from core.engine.run.runner import ModelRunner
from core.engine.sample.choosing import make_chooser
from core.engine.sample.sampler import Sampler
from core.engine.schedule.scheduler import Scheduler
from core.engine.step.batch import Batch, SlotState
from core.engine.step.decode_graphs import GraphedSteps, graph_sizes
from core.engine.step.forward import EagerSteps, RankParts
from core.engine.step.progress import Progress
from core.engine.step.recorder import Replay, Work, select_recorder
from core.interfaces.comm import SOLO
from core.interfaces.messages import (
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
)
from core.interfaces.model import ModelStep, VocabularyPart
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows
from core.settings.config import EngineConfig

VOCAB_SIZE = 32
MAX_MODEL_LEN = 4096
PAGE_SIZE = 16


class NullHead:
    """Logits of zeros."""

    part = VocabularyPart(SOLO.axes["tp"], 0, VOCAB_SIZE)

    def partial(self, hidden_RE: Tensor, rows: object) -> Tensor:
        return hidden_RE.new_zeros((hidden_RE.shape[0], VOCAB_SIZE))

    def whole(self, partial_AL: Tensor, rows: object) -> Tensor:
        return partial_AL

    def best(self, partial_AL: Tensor, rows: object, find: Any) -> Tensor:
        best_S: Tensor = find.best_of_parts(find.best_parts(partial_AL, 0, VOCAB_SIZE)[None])
        return best_S


class NullModel:
    """Computes nothing."""

    expert_layers = ()
    head = NullHead()

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        rows_T = input_ids_T if step.wanted is None else step.wanted.index_R
        return torch.zeros((rows_T.shape[0], 1), device=self._device)


class NullAttention:
    """No cache."""

    capturable = True

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        nothing: Any = self
        return ModelStep(nothing, nothing, rows, phase, batch.num_real)


class NullRecorder:
    """Replays that do nothing, for CPUs: what is left is the host's work."""

    def record(self, work: Work) -> Replay:
        results = work()
        return lambda: results

    def held_bytes(self) -> int:
        return 0


class InlineExecutor:
    """Runs steps where they are launched; nothing is left to wait for."""

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def launch(self, runner: ModelRunner, step: Any) -> Any:
        return _Done(runner.launch(step).to_host())

    def cpu_s(self) -> float:
        return 0.0


@dataclass(slots=True)
class _Done:
    _result: Any

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result


@dataclass
class Lists:
    """Inbox and outbox."""

    messages: list[EngineInput] = field(default_factory=list)

    def drain(self) -> list[EngineInput]:
        messages, self.messages = self.messages, []
        return messages

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        pass


def timed(owner: Any, name: str, into: list[float]) -> None:
    """Have a method write down its milliseconds."""
    method = getattr(owner, name)

    def measured(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        into.append((time.perf_counter() - start) * 1e3)
        return result

    setattr(owner, name, measured)


def build(batch: int, device: torch.device) -> tuple[Scheduler, ModelRunner]:
    """An engine whose every batch of decodes is captured."""
    config = EngineConfig(
        page_size=PAGE_SIZE, max_running_requests=batch, disable_prefix_cache=True
    )
    state = SlotState(num_slots=batch, max_tokens=MAX_MODEL_LEN, page_size=PAGE_SIZE, device=device)
    parts: Any = RankParts(
        model=NullModel(device),  # type: ignore[arg-type]
        attention=NullAttention(),  # type: ignore[arg-type]
        state=state,
        plan=Plan(),
        rank=0,
        stream=Layout.REPLICATED,
    )
    steps = GraphedSteps(
        parts,
        EagerSteps(parts, "prompts"),
        sizes=graph_sizes(batch),
        max_model_len=MAX_MODEL_LEN,
        staging=select_staging(device),
        recorder=select_recorder(device) if device.type == "cuda" else NullRecorder(),
    )
    steps.capture(lambda done, total: None)
    sampler = Sampler(max_slots=batch, vocab_size=VOCAB_SIZE, device=device, eos_ids=())
    tp = SOLO.axes["tp"]
    runner = ModelRunner(
        steps=steps,
        sampler=sampler,
        chooser=make_chooser(sampler, state, tp, NullHead(), shares_head=False),
        state=state,
        comm=tp,
        expert_balancer=NoExpertBalancer(),
        progress=Progress(),
    )
    scheduler = Scheduler(
        config,
        num_pages=batch * MAX_MODEL_LEN // PAGE_SIZE + 1,
        max_model_len=MAX_MODEL_LEN,
        eos_ids=(),
        dp_rank=0,
    )
    return scheduler, runner


def measure(batch: int, num_steps: int, context: int, device: torch.device) -> dict[str, Any]:
    """Decode steps of a full batch, prompts of `context` tokens."""
    scheduler, runner = build(batch, device)
    planning: list[float] = []
    launching: list[float] = []
    turns: list[float] = []
    timed(scheduler, "next_batch", planning)
    timed(scheduler, "commit", planning)
    lists = Lists()
    executor: Any = StreamExecutor() if device.type == "cuda" else InlineExecutor()
    timed(executor, "launch", launching)
    loop = EngineLoop(
        scheduler=scheduler,
        executor=StepExecutor(executor, runner),
        inbox=lists,
        outbox=lists,
        followers=NoFollowers(),
        lockstep=SoloLockstep(),
        wait_for_work=lambda: None,
    )
    timed(loop, "step", turns)
    greedy = SamplingParams(max_tokens=num_steps + 200, temperature=0.0, ignore_eos=True)
    lists.messages = [
        Generate(request_id=str(index), prompt_ids=[1] * context, sampling=greedy)
        for index in range(batch)
    ]
    running: RunningStep | None = None
    while len(scheduler._decode) < batch:
        running = loop.step(running)
    for times in (planning, launching, turns):
        times.clear()
    for _ in range(num_steps):
        running = loop.step(running)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch": batch,
        "plan_and_commit_ms": round(sum(planning) / num_steps, 4),
        "launch_ms": round(median(launching), 4),
        "turn_ms": round(median(turns), 4),
        "slowest_turn_ms": round(max(turns), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=1000)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(measure(arguments.batch, arguments.steps, arguments.context, device)))


if __name__ == "__main__":
    main()
