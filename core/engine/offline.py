"""An engine in this process, without HTTP: for benchmarks, tests and scripts.

Runs one rank (or, given the comms of a group, the scheduler's rank) and the same loop that
serves HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.engine.build import RankEngine
from core.engine.loop import EngineLoop, NoFollowers, PlanSender, RunningStep
from core.interfaces.messages import (
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


@dataclass(slots=True)
class Answer:
    """Everything one request produced."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    error: str | None = None

    def add(self, output: RequestOutput) -> None:
        """Take over what one step added."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.prompt_logprobs += output.prompt_logprobs or []
        self.num_cached_tokens += output.num_cached_tokens or 0
        self.finish_reason = output.finish_reason
        self.error = output.error


class _ListInbox:
    def __init__(self) -> None:
        self.messages: list[EngineInput] = []

    def drain(self, *, wait: bool) -> list[EngineInput]:
        messages, self.messages = self.messages, []
        return messages


class _ListOutbox:
    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        self.outputs += outputs


class OfflineEngine:
    """Generates for lists of prompts; `step` gives the control a test needs."""

    def __init__(self, rank: RankEngine, followers: PlanSender | None = None) -> None:
        self.scheduler = rank.scheduler
        self._inbox = _ListInbox()
        self._outbox = _ListOutbox()
        self._loop = EngineLoop(
            scheduler=rank.scheduler,
            launcher=rank.launcher,
            inbox=self._inbox,
            outbox=self._outbox,
            followers=followers or NoFollowers(),
        )
        self._running: RunningStep | None = None
        self._next_id = 0

    def submit(self, prompt_ids: list[int], sampling: SamplingParams) -> str:
        """Add a request; it is looked at by the next step. Returns its id."""
        self._next_id += 1
        request_id = str(self._next_id)
        self.send(Generate(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling))
        return request_id

    def send(self, message: EngineInput) -> None:
        """Hand any message to the next step."""
        self._inbox.messages.append(message)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox.messages) or self._running is not None or self.scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """One turn of the loop; what it put out."""
        self._running = self._loop.step(self._running)
        outputs, self._outbox.outputs = self._outbox.outputs, []
        return outputs

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Answer]:
        """Answers in the order of the prompts; one set of parameters for all, or one each."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        answers = {
            self.submit(prompt, params): Answer()
            for prompt, params in zip(prompts, each, strict=True)
        }
        while self.has_work:
            for output in self.step():
                answers[output.request_id].add(output)
        return list(answers.values())
