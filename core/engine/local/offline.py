"""An engine in this process, without HTTP: for benchmarks, tests and scripts.

Runs the leaders' loops that serve HTTP, over lists instead of sockets. Knows nothing of how ranks
are built or of who runs the followers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from core.engine.build.rank import RankEngine
from core.engine.run.lockstep import Lockstep, SoloLockstep
from core.engine.run.loop import EngineLoop, NoFollowers, RunningStep, StepSender
from core.interfaces.messages import (
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

# The DP rank for a request: its id, its prompt and how it is sampled.
Route = Callable[[str, Sequence[int], SamplingParams], int]


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

    def drain(self) -> list[EngineInput]:
        messages, self.messages = self.messages, []
        return messages


class _ListOutbox:
    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        self.outputs += outputs


class OfflineLeader:
    """The scheduler and the loop of one DP rank, turned by hand."""

    def __init__(self, rank: RankEngine, followers: StepSender, lockstep: Lockstep) -> None:
        self.scheduler = rank.scheduler
        self._inbox = _ListInbox()
        self._outbox = _ListOutbox()
        self._loop = EngineLoop(
            scheduler=rank.scheduler,
            executor=rank.executor,
            inbox=self._inbox,
            outbox=self._outbox,
            followers=followers,
            lockstep=lockstep,
            wait_for_work=lambda: None,  # whoever turns the loop knows when
        )
        self._running: RunningStep | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._inbox.messages) or self._running is not None or self.scheduler.has_work

    @property
    def is_parked(self) -> bool:
        """Whether no DP rank had work in the last turn."""
        return self._loop.parked

    def send(self, message: EngineInput) -> None:
        """Hand any message to the next turn."""
        self._inbox.messages.append(message)

    def step(self) -> list[RequestOutput]:
        """One turn of the loop; what it put out."""
        self._running = self._loop.step(self._running)
        outputs, self._outbox.outputs = self._outbox.outputs, []
        return outputs

    def run(self) -> list[RequestOutput]:
        """Turn until no DP rank has work; with several, all leaders do so at once."""
        outputs = self.step()
        while not self.is_parked:
            outputs += self.step()
        return outputs


class OfflineEngine:
    """One DP rank: generates for lists of prompts; `step` gives the control a test needs."""

    def __init__(
        self,
        rank: RankEngine,
        followers: StepSender | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        """`lockstep`: of the only DP rank there is, unless given."""
        self._leader = OfflineLeader(rank, followers or NoFollowers(), lockstep or SoloLockstep())
        self.scheduler = rank.scheduler
        self._next_id = 0

    def submit(self, prompt_ids: list[int], sampling: SamplingParams) -> str:
        """Add a request; it is looked at by the next step. Returns its id."""
        self._next_id += 1
        request_id = str(self._next_id)
        self.send(Generate(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling))
        return request_id

    def send(self, message: EngineInput) -> None:
        """Hand any message to the next step."""
        self._leader.send(message)

    @property
    def has_work(self) -> bool:
        return self._leader.has_work

    def step(self) -> list[RequestOutput]:
        """One turn of the loop; what it put out."""
        return self._leader.step()

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Answer]:
        """Answers in the order of the prompts; one set of parameters for all, or one each."""
        answers = {
            self.submit(prompt, params): Answer()
            for prompt, params in zip(prompts, _each(sampling, len(prompts)), strict=True)
        }
        while self.has_work:
            for output in self.step():
                answers[output.request_id].add(output)
        return list(answers.values())


class SpreadEngine:
    """Several DP ranks, each leader's loop in a thread of its own while there is work.

    All requests of a call are there before the first turn, and all leaders take their turns in
    lockstep: the same calls give the same steps.
    """

    def __init__(self, leaders: Sequence[OfflineLeader], route: Route) -> None:
        self.schedulers = [leader.scheduler for leader in leaders]
        self._leaders = leaders
        self._route = route
        self._next_id = 0

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Answer]:
        """Answers in the order of the prompts; one set of parameters for all, or one each."""
        answers: dict[str, Answer] = {}
        for prompt, params in zip(prompts, _each(sampling, len(prompts)), strict=True):
            self._next_id += 1
            request_id = str(self._next_id)
            answers[request_id] = Answer()
            leader = self._leaders[self._route(request_id, prompt, params)]
            leader.send(Generate(request_id=request_id, prompt_ids=prompt, sampling=params))
        with ThreadPoolExecutor(len(self._leaders)) as pool:
            turning = [pool.submit(leader.run) for leader in self._leaders]
            ended, _ = wait(turning, return_when=FIRST_EXCEPTION)  # the others' may be its echo
            for leader_outputs in ended:
                for output in leader_outputs.result():
                    answers[output.request_id].add(output)
        return list(answers.values())


def _each(
    sampling: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    return [sampling] * count if isinstance(sampling, SamplingParams) else sampling
