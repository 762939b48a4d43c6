"""The requests whose prompts wait or are being computed, and which of their tokens a step computes.

Knows nothing of decodes but that a request whose prompt is done becomes one, nor of results.
"""

import enum
import itertools
from collections.abc import Iterable, Iterator

from core.engine.schedule.decode_set import DecodeSet
from core.engine.schedule.prompt_budget import PromptBudget
from core.engine.schedule.prompt_order import PromptOrder
from core.engine.schedule.request import Request, State
from core.engine.schedule.running_set import RunningSet
from core.engine.schedule.step_builder import StepBuilder
from core.engine.schedule.step_size import StepSize
from core.engine.schedule.waiting import WaitingQueue, age_key
from core.interfaces.messages import EngineStats, SlotInit

# Waiting requests looked past in a step because most of their prompt is being computed by another.
MAX_DEFERRED = 4


class Entry(enum.Enum):
    """What came of letting a waiting request in."""

    ENTERED = enum.auto()
    DEFERRED = enum.auto()  # most of its prompt is being computed by another in this step
    NO_BUDGET = enum.auto()
    NO_PAGES = enum.auto()


class Prompts:
    """Of one scheduler, whose pages, decodes and statistics it shares."""

    def __init__(
        self,
        *,
        running_set: RunningSet,
        decode: DecodeSet,
        size: StepSize,
        order: PromptOrder,
        page_size: int,
        table_changes: list[tuple[Request, int]],
        stats: EngineStats,
    ) -> None:
        """`table_changes`: requests and columns whose page is not announced yet; gets more."""
        self._running_set = running_set
        self._decode = decode
        self._size = size
        self._order = order
        self._page_size = page_size
        self._table_changes = table_changes
        self._stats = stats
        self.waiting = WaitingQueue()
        self.prefilling: list[Request] = []
        # Waiting requests that found too few pages; not tried again until some are released.
        self._blocked: set[Request] = set()

    def __iter__(self) -> Iterator[Request]:
        """All of them, running ones first."""
        return itertools.chain(self.prefilling, self.waiting.by_age())

    def wait(self, request: Request, step: int) -> None:
        """Put a request into the queue before a step, with what it will have to compute as far as
        that is known."""
        cached = self._running_set.match(request, step).pages
        self.waiting.add(request, request.num_known - len(cached) * self._page_size)

    def pages_came(self) -> None:
        """Pages were released, or one that waited for them is gone."""
        self._blocked.clear()

    def plan(self, builder: StepBuilder, *, may_admit: bool, beside_decodes: bool) -> None:
        """Add rows for prompts, running ones and those that enter, while the budget lasts.
        `beside_decodes`: of this DP rank or of others, who wait for the step as well."""
        if not self.prefilling and not self.waiting:
            self._size.no_prompts_wait()
            return
        if not self.prefilling and not may_admit:
            return
        backlog = sum(request.tokens_left for request in self.prefilling) + self.waiting.tokens
        budget = self._size.budget(backlog, builder.starts, beside_decodes=beside_decodes)
        for candidates in self._order.passes(
            self.prefilling,
            self.waiting,
            budget,
            lambda request: may_admit and self._may_enter(request),
        ):
            self._plan_pass(builder, candidates, budget, may_admit=may_admit)

    def _may_enter(self, request: Request) -> bool:
        """Whether a waiting request is worth trying: there is a slot, pages were not found to be
        too few, and the oldest that waits for pages was not passed too often."""
        if not self._running_set.has_free_slot or request in self._blocked:
            return False
        oldest = self.waiting.oldest
        return (
            oldest is request
            or oldest not in self._blocked
            or oldest.overtaken_pages < self._running_set.num_usable_pages
        )

    def _plan_pass(
        self,
        builder: StepBuilder,
        candidates: Iterable[Request],
        budget: PromptBudget,
        *,
        may_admit: bool,
    ) -> None:
        num_deferred = 0
        for request in candidates:
            if budget.is_spent:
                return
            if request.planned_step == builder.step:
                continue
            if request.state is State.WAITING:
                if not may_admit or not self._may_enter(request):
                    may_admit = False  # nobody passes in this order
                    continue
                entry = self._enter(builder, request, budget)
                if entry is Entry.DEFERRED and num_deferred < MAX_DEFERRED:
                    num_deferred += 1
                    continue
                if entry is not Entry.ENTERED:
                    may_admit = False
                    continue
            self._plan_chunk(builder, request, budget)

    def _enter(self, builder: StepBuilder, request: Request, budget: PromptBudget) -> Entry:
        """Let a waiting request in, where there are pages and budget for it."""
        running_set = self._running_set
        match = running_set.match(request, builder.step)
        start = len(match.pages) * self._page_size
        to_compute = request.num_known - start
        if match.num_pending * self._page_size * 2 >= to_compute:
            return Entry.DEFERRED
        if not budget.fitting(start, to_compute, request.wants_prompt_logprobs):
            return Entry.NO_BUDGET
        if not running_set.enter(request, match):
            self._blocked.add(request)
            return Entry.NO_PAGES
        oldest = self.waiting.oldest
        assert oldest is not None
        if oldest in self._blocked:
            oldest.overtaken_pages += len(request.pages)
        self.waiting.remove(request)
        request.overtaken_pages = 0
        self._start(builder, request)
        return Entry.ENTERED

    def _start(self, builder: StepBuilder, request: Request) -> None:
        """Tell the runners of a request that has entered."""
        request.state = State.PREFILLING
        self.prefilling.append(request)
        self._stats.cached_tokens += request.num_computed
        if request.prompt_logprobs is not None and not request.answered:
            request.prompt_logprobs = []  # what a preempted run had collected is computed again
        known = request.tokens.copy()
        builder.inits.append(
            SlotInit(request.slot, known, request.num_prompt, request.sampling, request.seed)
        )
        for column in range(len(request.pages)):
            builder.set_page(request, column)

    def _plan_chunk(self, builder: StepBuilder, request: Request, budget: PromptBudget) -> None:
        """Add a row that computes more of a request's known tokens, as far as the budget goes."""
        start, num_known = request.num_computed, request.num_known
        with_logprobs = request.wants_prompt_logprobs
        length = budget.fitting(start, num_known - start, with_logprobs)
        if not length:
            return
        budget.spend(start, length, with_logprobs)
        request.planned_step = builder.step
        request.num_computed = end = start + length
        samples = end == num_known and num_known < request.max_tokens_total
        builder.requests.append(request)
        builder.slots.append(request.slot)
        builder.starts.append(start)
        builder.lengths.append(length)
        builder.samples.append(samples)
        if request.sampling.prompt_logprobs is not None:
            # As the runners do: the last prompt position predicts the first answer token.
            builder.num_logprob_rows += max(min(end, request.num_prompt - 1) - start, 0)
        for column in self._running_set.share(request, builder.step):
            self._table_changes.append((request, column))
        if end == num_known:
            self.prefilling.remove(request)
            if num_known + 1 < request.max_tokens_total:
                request.state = State.DECODING
                self._decode.add(request, builder.step + 1)
            else:
                request.state = State.ENDING
                builder.last.append((request, len(builder.sampled) if samples else -1))
        if samples:
            builder.sampled.append(request)
            builder.best_only &= request.sampling.takes_best
        self._stats.prompt_tokens += length

    def check(self, by_state: dict[State, list[Request]]) -> None:
        """Assert that the queues agree with the states of the live requests."""
        self.waiting.check()
        assert list(self.waiting.by_age()) == sorted(by_state[State.WAITING], key=age_key)
        assert set(self.prefilling) == set(by_state[State.PREFILLING])
        assert all(request in self.waiting for request in self._blocked)
