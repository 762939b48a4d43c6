"""Random requests, steps and aborts against the scheduler; every invariant after every move."""

import dataclasses

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.engine.schedule.pace import Pace
from core.engine.schedule.prompt_budget import LEAST_TOKENS
from core.engine.schedule.request import State
from core.engine.schedule.scheduler import QUEUE_TIMEOUT, Scheduler
from core.engine.schedule.waiting import age_key
from core.interfaces.messages import (
    Abort,
    Generate,
    RequestOutput,
    SamplingParams,
    ScheduledStep,
    StepResult,
)
from core.settings.config import EngineConfig
from tests.support.fake_runner import VOCAB_SIZE, Expected, FakeRunner, expected_answer

EOS_IDS = [0, 1]
MAX_MODEL_LEN = 40


@dataclasses.dataclass
class Live:
    """A request under way: what it must say, and what it has said."""

    message: Generate
    expected: Expected
    token_ids: list[int] = dataclasses.field(default_factory=list)
    outputs: int = 0


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        pool_tokens=st.integers(6, 60),
        max_running=st.integers(1, 6),
        chunk=st.sampled_from([-1, 1, 2, 5, 100]),
        budget=st.sampled_from([1, 3, 8, 100]),
        disable_prefix_cache=st.sampled_from([False, False, True]),
        headroom=st.sampled_from([0, 1, 3, 64]),
        pace=st.sampled_from([Pace(), Pace(), Pace(0.05, 0.001, 0.2)]),
        mixed=st.sampled_from([None, 1, 2, 5]),
    )
    def start(
        self,
        page_size: int,
        pool_tokens: int,
        max_running: int,
        chunk: int,
        budget: int,
        disable_prefix_cache: bool,
        headroom: int,
        pace: Pace,
        mixed: int | None,
    ) -> None:
        num_pages = 1 + max(2, pool_tokens // page_size)
        config = EngineConfig(
            page_size=page_size,
            max_running_requests=max_running,
            chunked_prefill_size=chunk,
            max_prefill_tokens=budget,
            disable_prefix_cache=disable_prefix_cache,
        )
        self.config, self.pace = config, pace
        self.now_s = 0.0
        self.pool_tokens = (num_pages - 1) * page_size
        self.scheduler = Scheduler(
            config,
            num_pages=num_pages,
            max_model_len=MAX_MODEL_LEN,
            eos_ids=EOS_IDS,
            mixed_tokens=mixed,
            headroom_tokens=headroom,
            pace=pace,
            clock=lambda: self.now_s,
        )
        self.runner = FakeRunner(page_size, num_pages)
        self.in_flight: list[tuple[ScheduledStep, StepResult]] = []
        self.live: dict[str, Live] = {}
        self.num_requests = 0

    @rule(
        shared=st.integers(0, 2),
        shared_length=st.integers(0, 12),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12),
        max_tokens=st.integers(0, 30),
        min_tokens=st.integers(0, 6),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.sampled_from([0, 0, 1, -1]),
        queue_timeout_s=st.sampled_from([0.0, 0.0, 5.0]),
    )
    def add(
        self,
        shared: int,
        shared_length: int,
        tail: list[int],
        priority: int,
        queue_timeout_s: float,
        **sampling: object,
    ) -> None:
        prompt = [(shared + position) % VOCAB_SIZE for position in range(shared_length)] + tail
        self.num_requests += 1
        message = Generate(
            request_id=str(self.num_requests),
            prompt_ids=prompt,
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            priority=priority,
            queue_timeout_s=queue_timeout_s,
        )
        answers = self._admit(message)
        if not 0 < len(prompt) < min(self.pool_tokens, MAX_MODEL_LEN):
            assert [answer.finish_reason for answer in answers] == ["error"]
            return
        assert not answers
        max_len = min(self.pool_tokens + 1, MAX_MODEL_LEN)
        self.live[message.request_id] = Live(
            message,
            expected_answer(prompt, message.sampling, eos_ids=EOS_IDS, max_len=max_len),
        )

    @rule(which=st.integers(0, 100), unknown=st.booleans())
    def abort(self, which: int, unknown: bool) -> None:
        ids = ["never seen"] if unknown else []
        if self.live:
            ids.append(list(self.live)[which % len(self.live)])
            del self.live[ids[-1]]
        assert self._admit(Abort(ids)) == []

    @rule(seconds=st.floats(0.2, 4.0))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        assert self._admit() == []

    def _admit(self, *messages: Generate | Abort) -> list[RequestOutput]:
        """Returns the answers to these messages alone; others ended because they waited long."""
        answers = []
        for answer in self.scheduler.admit(messages):
            if answer.error_code != QUEUE_TIMEOUT:
                answers.append(answer)
                continue
            late = self.live.pop(answer.request_id)
            assert late.message.queue_timeout_s
            assert not late.outputs, "it was begun"
        return answers

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        running = list(self.scheduler._running_set.running)
        # Whose last token is under way needs neither slot nor pages any more.
        staying = [request for request in running if request.state is not State.ENDING]
        first = min(staying, key=age_key, default=None)
        plan = self.scheduler.next_batch()
        assert first is None or first.slot >= 0, "the first was preempted"
        if plan is None:
            return
        assert plan.slots
        prefills = plan.lengths[plan.num_decodes :]
        if self.config.chunked_prefill_size != -1:
            assert sum(prefills) <= self.config.max_prefill_tokens
            assert max(prefills, default=0) <= self.config.chunked_prefill_size
            starts = plan.starts[plan.num_decodes :]
            seconds = [
                self.pace.prompt_s(start, length, False)
                for start, length in zip(starts, prefills, strict=True)
            ]
            least = self.pace.prompt_s(starts[0], LEAST_TOKENS, True) if starts else 0.0
            assert sum(seconds) <= max(self.scheduler.step_s, least) * (1 + 1e-9)
        elif len(prefills) > 1:
            assert sum(prefills) <= self.config.max_prefill_tokens
        self.in_flight.append((plan, self.runner.run(plan)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        plan, result = self.in_flight.pop(0)
        outputs = self.scheduler.commit(plan, result)
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            self._take(output)

    @rule(turns=st.integers(1, 8))
    def overlap(self, turns: int) -> None:
        """What the loop does."""
        for _ in range(turns):
            if len(self.in_flight) == 2:
                self.commit()
            self.plan()
            if self.in_flight:
                self.commit()
            self.scheduler.check()

    def _take(self, output: RequestOutput) -> None:
        live = self.live[output.request_id]
        prompt, sampling = live.message.prompt_ids, live.message.sampling
        first = live.outputs == 0
        live.outputs += 1
        live.token_ids += output.token_ids
        assert live.token_ids == live.expected.token_ids[: len(live.token_ids)]
        assert (output.num_cached_tokens is not None) == first
        wants_prompt = first and sampling.prompt_logprobs is not None
        assert (output.prompt_logprobs is not None) == wants_prompt
        if wants_prompt:
            assert output.num_cached_tokens == 0
            told = [(entry.rank, entry.token_id) for entry in output.prompt_logprobs or []]
            assert told == list(enumerate(prompt))[1:]
        if sampling.logprobs is not None and output.token_ids:
            assert output.logprobs is not None
            ranks = [entry.rank for entry in output.logprobs]
            assert ranks == [len(prompt) + len(live.token_ids) - 1]
        if output.finish_reason is not None:
            told_end = (live.token_ids, output.finish_reason, output.stop_token_id)
            assert told_end == dataclasses.astuple(live.expected)
            del self.live[output.request_id]

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats.num_running <= self.config.running_limit
        assert self.scheduler.has_work == bool(self.live or self.in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        turns = 0
        while self.scheduler.has_work:
            self.overlap(1)
            turns += 1
            assert turns < 5_000, "no progress"
        assert not self.live
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages_total


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure, add Phase.shrink and some minutes
    suppress_health_check=list(HealthCheck),
)
