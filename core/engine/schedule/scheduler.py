"""Decides every step of one DP rank: which requests run, and which tokens of each.

Pure Python: knows nothing of torch, devices, sockets or threads. The loop calls `next_batch`
for step n+1 before `commit` of step n (or strictly in turn); steps run in the order in which they
were planned. Much here follows from that order:

- A page freed now may be given away now: its next writer runs after every step that reads it.
- A page is put into the prefix cache when the step that computes it is planned, and read from the
  next planned step on.
- The input of a decode row may be unknown here yet; runners keep sampled tokens by slot.

docs/scheduler.md tells how it decides.
"""

import enum
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from core.engine.schedule.decode_set import DecodeSet
from core.engine.schedule.pace import LONGEST_STEP_S, Pace
from core.engine.schedule.prompt_budget import LEAST_BASE_COSTS, LEAST_SHARE, PromptBudget
from core.engine.schedule.prompt_order import OldestAndShortest, PromptOrder
from core.engine.schedule.request import Request, State
from core.engine.schedule.residents import Residents
from core.engine.schedule.waiting import WaitingQueue, age_key
from core.interfaces.messages import (
    Abort,
    EngineStats,
    Generate,
    RequestOutput,
    SlotInit,
    StepPlan,
    StepResult,
)
from core.settings.config import EngineConfig

# Tokens that every running request must still have room for when another one is let in.
HEADROOM_TOKENS = 32
# Waiting requests looked past in a step because most of their prompt is being computed by another.
MAX_DEFERRED = 4
# How much a step's time may differ from what the pace says, and what one step counts of late. The
# pace may have been measured while the machine had ten times as much to do.
LEAST_SLOWNESS, MOST_SLOWNESS, SLOWNESS_WEIGHT = 0.1, 3.0, 0.2
# Most steps that the prompts which wait are spread over for the sake of those that decode.
BACKLOG_STEPS = 4
EXPIRY_INTERVAL_S = 0.1  # between two looks at deadlines
QUEUE_TIMEOUT = "queue_timeout"  # RequestOutput.error_code of one that waited too long
UNKNOWN_PACE = Pace()
ORDER = OldestAndShortest()
_SEED_MASK = (1 << 64) - 1


class Entry(enum.Enum):
    """What came of letting a waiting request in."""

    ENTERED = enum.auto()
    DEFERRED = enum.auto()  # most of its prompt is being computed by another in this step
    NO_BUDGET = enum.auto()
    NO_PAGES = enum.auto()


@dataclass(slots=True)
class _Draft:
    """A plan in the making, and what `commit` needs of it later."""

    step: int
    num_decodes: int
    requests: list[Request]  # by row
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    samples: list[bool]
    sampled: list[Request]  # by index into the result's token_ids
    # Requests whose last row this is, with its index into `sampled`; -1: it samples nothing.
    last: list[tuple[Request, int]]
    inits: list[SlotInit] = field(default_factory=list)
    table_slots: list[int] = field(default_factory=list)
    table_columns: list[int] = field(default_factory=list)
    table_pages: list[int] = field(default_factory=list)
    num_logprob_rows: int = 0
    best_only: bool = False

    def set_page(self, request: Request, column: int) -> None:
        self.table_slots.append(request.slot)
        self.table_columns.append(column)
        self.table_pages.append(request.pages[column])


class Scheduler:
    """Continuous batching over paged KV with a shared prefix cache; see docs/scheduler.md.

    `num_pages` includes the scratch page 0; `eos_ids` end every answer that does not ignore them.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        eos_ids: Sequence[int],
        dp_rank: int = 0,
        headroom_tokens: int = HEADROOM_TOKENS,
        pace: Pace = UNKNOWN_PACE,
        order: PromptOrder = ORDER,
        clock: Callable[[], float] = time.monotonic,
        mixed_tokens: int | None = None,
    ) -> None:
        """`pace`: where it is known, a step's prompts are cut to `engine.cpu_step_s`, or to what is
        worthwhile at that pace. `mixed_tokens`: most prompt tokens beside decodes, while few wait;
        None: as many as without."""
        self._chunk_tokens = config.chunked_prefill_size
        self._step_prefill_tokens = config.max_prefill_tokens
        self._mixed_tokens = mixed_tokens
        self._burst_tokens = 0  # prompt tokens of a step with decodes, since none waited
        self._chosen_step_s = config.cpu_step_s
        self._pace = UNKNOWN_PACE if config.cpu_step_s == 0 else pace
        self._slowness = 1.0  # of late, against the pace
        self._order = order
        self._clock = clock
        self._next_expiry_s = 0.0
        self._page_size = config.settled_page_size
        self._max_model_len = max_model_len
        self._dp_rank = dp_rank
        self._eos_ids = frozenset(eos_ids)
        # Each DP rank draws other seeds, lest the same prompt get the same answer on all.
        self._rng = random.Random(config.seed if dp_rank == 0 else f"{config.seed}/{dp_rank}")
        self._residents = Residents(config, num_pages=num_pages, headroom_tokens=headroom_tokens)
        self._pool_tokens = self._residents.num_usable_pages * self._page_size
        self._live: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._prefilling: list[Request] = []
        self._decode = DecodeSet(self._page_size)
        # Waiting requests that found too few pages; not tried again until some are released.
        self._blocked: set[Request] = set()
        # Requests and columns whose page is not announced yet; those without a slot are void.
        self._table_changes: list[tuple[Request, int]] = []
        self._in_flight: deque[_Draft] = deque()
        self._planned = 0  # the last planned step
        self._num_arrivals = 0
        self._stats = EngineStats(kv_pages_total=self._residents.num_usable_pages)

    # Requests come and go

    def admit(self, messages: Iterable[Generate | Abort]) -> list[RequestOutput]:
        """Queue new requests and drop aborted ones; answers those that can never run."""
        answers: list[RequestOutput] = []
        for message in messages:
            if isinstance(message, Abort):
                for request_id in message.request_ids:
                    if (request := self._live.get(request_id)) is not None:
                        self._end(request)
            elif (problem := self._problem(len(message.prompt_ids))) is not None:
                answers.append(
                    RequestOutput(message.request_id, [], finish_reason="error", error=problem)
                )
            else:
                self._enqueue(message)
        return answers + self._expire()

    def _expire(self) -> list[RequestOutput]:
        """End requests whose time in the queue is over before they ever ran."""
        now = self._clock()
        if now < self._next_expiry_s or not self._waiting:
            return []
        self._next_expiry_s = now + EXPIRY_INTERVAL_S
        answers = []
        for request in self._waiting.by_age():
            if request.deadline_s is None or request.deadline_s > now or request.has_run:
                continue
            self._end(request)
            answers.append(
                RequestOutput(
                    request.request_id,
                    [],
                    finish_reason="error",
                    error="the server has too much to do: the request was not begun within the "
                    "time that requests may wait (frontend.queue_timeout_s); try again later",
                    error_code=QUEUE_TIMEOUT,
                )
            )
        self._stats.num_queue_timeouts += len(answers)
        return answers

    def _problem(self, num_prompt: int) -> str | None:
        """Why a prompt can't ever run, or None."""
        if num_prompt == 0:
            return "the prompt has no tokens; send at least one"
        for limit, what, key in (
            (self._max_model_len, "model's context", "model.max_model_len"),
            (self._pool_tokens, "KV cache", "engine.kv_cache_tokens"),
        ):
            if num_prompt + 1 > limit:
                return (
                    f"the prompt has {num_prompt} tokens and needs room for one more, but the "
                    f"{what} has {limit}; send at most {limit - 1}, or raise {key}"
                )
        return None

    def _enqueue(self, message: Generate) -> None:
        sampling = message.sampling
        assert message.request_id not in self._live, f"{message.request_id} is live already"
        stop_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        if sampling.stop_token_ids:
            stop_ids = stop_ids.union(sampling.stop_token_ids)
        num_prompt = len(message.prompt_ids)
        drawn = self._rng.getrandbits(64)
        self._num_arrivals += 1
        request = Request(
            request_id=message.request_id,
            sampling=sampling,
            tokens=list(message.prompt_ids),
            num_prompt=num_prompt,
            seed=drawn if sampling.seed is None else sampling.seed & _SEED_MASK,
            arrival=self._num_arrivals,
            stop_ids=stop_ids,
            # The last token of an answer is never computed: a full pool allows one more.
            max_tokens_total=min(
                num_prompt + sampling.max_tokens, self._max_model_len, self._pool_tokens + 1
            ),
            prompt_logprobs=None if sampling.prompt_logprobs is None else [],
            priority=message.priority,
            deadline_s=self._clock() + message.queue_timeout_s if message.queue_timeout_s else None,
        )
        self._live[request.request_id] = request
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Put a request into the queue, with what it will have to compute as far as is known."""
        cached = self._residents.match(request, self._planned + 1).pages
        self._waiting.add(request, request.num_known - len(cached) * self._page_size)

    def _end(self, request: Request) -> None:
        """Forget a finished or aborted request; what steps in flight yield for it is ignored."""
        if request.state is State.WAITING:
            self._waiting.remove(request)
            self._blocked.clear()
        else:
            self._vacate(request)
        request.state = State.ENDED
        request.ended = True
        del self._live[request.request_id]

    def _vacate(self, request: Request) -> None:
        """Take a request out of the running set."""
        if request.slot < 0:  # ending, and its pages were needed before its last token came
            return
        if request.state is State.DECODING:
            self._decode.remove(request)
        elif request.state is State.PREFILLING:
            self._prefilling.remove(request)
        self._residents.leave(request, self._planned)
        self._blocked.clear()

    def _make_room(self) -> None:
        """Free a running request's pages: one that is ending anyway, else the latest to arrive of
        those with the highest priority number."""
        for request in self._residents.running:
            if request.state is State.ENDING:
                self._vacate(request)
                return
        request = max(self._residents.running, key=age_key)
        self._vacate(request)
        request.state = State.WAITING
        self._wait(request)
        self._stats.num_preemptions += 1

    # Planning a step

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a planned step is not committed."""
        return bool(self._live or self._in_flight)

    def has_prompts_for(self, seconds: float) -> bool:
        """Whether prompts that run or wait would take so long, as far as the pace is known."""
        if not self._pace.known:
            return False
        left_s = 0.0
        for request in itertools.chain(self._prefilling, self._waiting.by_age()):
            left_s += self._pace.prompt_s(
                request.num_computed, request.tokens_left, request.wants_prompt_logprobs
            )
            if left_s >= seconds:
                return True
        return False

    def next_batch(self, decodes_follow: Sequence[bool] = ()) -> StepPlan | None:
        """Plan the next step; None where nothing can run before the step in flight is committed,
        or at all. The lists of a plan are never changed afterwards. `decodes_follow`: what each DP
        rank's last plan said; this one's own doesn't count."""
        assert len(self._in_flight) < 2, "commit the oldest step first"
        step = self._planned + 1
        decode = self._decode
        starved = self._grow_decodes(step)
        num_decodes = len(decode)
        draft = _Draft(
            step=step,
            num_decodes=num_decodes,
            requests=decode.requests.copy(),
            slots=decode.slots.copy(),
            starts=decode.advance(),
            lengths=[1] * num_decodes,
            samples=[True] * num_decodes,
            sampled=decode.requests.copy(),
            best_only=decode.best_only,
            last=decode.pop_last(step),
        )
        for request, _ in draft.last:
            request.state = State.ENDING
        for request, column in self._table_changes:
            if request.slot >= 0:
                draft.set_page(request, column)
        self._table_changes.clear()
        # Who gave way may still get a token from the step in flight, so nobody enters now; before
        # the next planned step that one is committed.
        others_decode = any(
            follows for dp_rank, follows in enumerate(decodes_follow) if dp_rank != self._dp_rank
        )
        self._plan_prefills(
            draft, may_admit=not starved, beside_decodes=num_decodes > 0 or others_decode
        )
        self._residents.end_step()
        if not draft.requests:
            assert self._in_flight or not self._waiting, "requests wait, but nothing can run"
            return None
        self._planned = step
        self._in_flight.append(draft)
        self._stats.num_steps += 1
        return StepPlan(
            step=step,
            inits=draft.inits,
            num_decodes=num_decodes,
            slots=draft.slots,
            starts=draft.starts,
            lengths=draft.lengths,
            samples=draft.samples,
            table_slots=draft.table_slots,
            table_columns=draft.table_columns,
            table_pages=draft.table_pages,
            num_logprob_rows=draft.num_logprob_rows,
            best_only=draft.best_only,
            decodes_follow=len(decode) > 0,
        )

    def _grow_decodes(self, step: int) -> bool:
        """Give each decode that needs one a page; True where others had to give way."""
        needy = self._decode.pop_needing_page(step)
        if not needy:
            return False
        residents = self._residents
        pages = residents.take(len(needy))
        starved = pages is None
        if pages is None:
            pages = []
            # In order of arrival: whoever gives way to one comes later, and has none yet.
            needy.sort(key=age_key)
            for request in needy:
                while request.slot >= 0:
                    if (page := residents.take(1)) is not None:
                        pages += page
                        break
                    self._make_room()
            needy = [request for request in needy if request.slot >= 0]
        for request, page_id in zip(needy, pages, strict=True):
            self._table_changes.append((request, len(request.pages)))
            request.pages.append(page_id)
        self._decode.grew(needy, step)
        return starved

    def _plan_prefills(self, draft: _Draft, *, may_admit: bool, beside_decodes: bool) -> None:
        """Add rows for prompts, running ones and those that enter, while the budget lasts.
        `beside_decodes`: of this DP rank or of others, who wait for the step as well."""
        if not self._prefilling and not self._waiting:
            self._burst_tokens = 0
            return
        if not self._prefilling and not may_admit:
            return
        budget = PromptBudget(
            tokens=self._prompt_tokens(beside_decodes),
            chunk=self._chunk_tokens,
            seconds=self._prompt_s(draft),
            pace=self._pace,
        )
        for candidates in self._order.passes(
            self._prefilling,
            self._waiting,
            budget,
            lambda request: may_admit and self._may_enter(request),
        ):
            self._plan_pass(draft, candidates, budget, may_admit=may_admit)

    def _prompt_tokens(self, beside_decodes: bool) -> int:
        """Prompt tokens of a step. Beside decodes what waits is spread evenly over steps of about
        `mixed_tokens`, lest decodes wait long, but over no more than a few, lest prompts do: each
        step costs its launches and its decodes. Steps don't shrink until no prompt waits."""
        most = self._step_prefill_tokens
        if self._mixed_tokens is None or not beside_decodes:
            return most
        backlog = self._backlog_tokens
        num_steps = min(max(round(backlog / self._mixed_tokens), 1), BACKLOG_STEPS)
        # What is known of prompts that wait may be too little: the cache may lose what it had.
        least = self._mixed_tokens * 3 // 4
        self._burst_tokens = max(-(-backlog // num_steps), least, 1, self._burst_tokens)
        return min(self._burst_tokens, most)

    @property
    def _backlog_tokens(self) -> int:
        """That prompts have to compute, as far as is known."""
        return sum(request.tokens_left for request in self._prefilling) + self._waiting.tokens

    @property
    def step_s(self) -> float:
        """How long a step with prompts should take now, where the pace is known."""
        if self._chosen_step_s is not None:
            return self._chosen_step_s
        return self._pace.worthwhile_s(self._slowness)

    def _prompt_s(self, draft: _Draft) -> float:
        """Seconds at the pace that a step has for prompts, beside its decodes. What makes a step
        worth its cost may be long where the machine was busy when the pace was measured, and takes
        no longer than the longest of steps."""
        step_s, base_s = self.step_s / self._slowness, self._pace.base_s
        left_s = step_s - base_s - self._pace.decode_s(draft.starts)
        worthwhile_s = min(LEAST_BASE_COSTS * base_s, LONGEST_STEP_S / self._slowness)
        return max(left_s, LEAST_SHARE * step_s, worthwhile_s)

    def observe(self, expected_s: float, actual_s: float) -> None:
        """A step with prompts took so long. A machine has other things to do now and then, also
        while the pace was measured."""
        ratio = min(max(actual_s / expected_s, LEAST_SLOWNESS), MOST_SLOWNESS)
        self._slowness += SLOWNESS_WEIGHT * (ratio - self._slowness)

    def _may_enter(self, request: Request) -> bool:
        """Whether a waiting request is worth trying: there is a slot, pages were not found to be
        too few, and the oldest that waits for pages was not passed too often."""
        if not self._residents.has_free_slot or request in self._blocked:
            return False
        oldest = self._waiting.oldest
        return (
            oldest is request
            or oldest not in self._blocked
            or oldest.overtaken_pages < self._residents.num_usable_pages
        )

    def _plan_pass(
        self,
        draft: _Draft,
        candidates: Iterable[Request],
        budget: PromptBudget,
        *,
        may_admit: bool,
    ) -> None:
        num_deferred = 0
        for request in candidates:
            if budget.is_spent:
                return
            if request.planned_step == draft.step:
                continue
            if request.state is State.WAITING:
                if not may_admit or not self._may_enter(request):
                    may_admit = False  # nobody passes in this order
                    continue
                entry = self._enter(draft, request, budget)
                if entry is Entry.DEFERRED and num_deferred < MAX_DEFERRED:
                    num_deferred += 1
                    continue
                if entry is not Entry.ENTERED:
                    may_admit = False
                    continue
            self._plan_chunk(draft, request, budget)

    def _enter(self, draft: _Draft, request: Request, budget: PromptBudget) -> Entry:
        """Let a waiting request in, where there are pages and budget for it."""
        residents = self._residents
        match = residents.match(request, draft.step)
        start = len(match.pages) * self._page_size
        to_compute = request.num_known - start
        if match.num_pending * self._page_size * 2 >= to_compute:
            return Entry.DEFERRED
        if not budget.fitting(start, to_compute, request.wants_prompt_logprobs):
            return Entry.NO_BUDGET
        if not residents.enter(request, match):
            self._blocked.add(request)
            return Entry.NO_PAGES
        oldest = self._waiting.oldest
        assert oldest is not None
        if oldest in self._blocked:
            oldest.overtaken_pages += len(request.pages)
        self._waiting.remove(request)
        request.overtaken_pages = 0
        self._start(draft, request)
        return Entry.ENTERED

    def _start(self, draft: _Draft, request: Request) -> None:
        """Tell the runners of a request that has entered."""
        request.state = State.PREFILLING
        self._prefilling.append(request)
        self._stats.cached_tokens += request.num_computed
        if request.prompt_logprobs is not None and not request.answered:
            request.prompt_logprobs = []  # what a preempted run had collected is computed again
        known = request.tokens.copy()
        draft.inits.append(
            SlotInit(request.slot, known, request.num_prompt, request.sampling, request.seed)
        )
        for column in range(len(request.pages)):
            draft.set_page(request, column)

    def _plan_chunk(self, draft: _Draft, request: Request, budget: PromptBudget) -> None:
        """Add a row that computes more of a request's known tokens, as far as the budget goes."""
        start, num_known = request.num_computed, request.num_known
        with_logprobs = request.wants_prompt_logprobs
        length = budget.fitting(start, num_known - start, with_logprobs)
        if not length:
            return
        budget.spend(start, length, with_logprobs)
        request.planned_step = draft.step
        request.num_computed = end = start + length
        samples = end == num_known and num_known < request.max_tokens_total
        draft.requests.append(request)
        draft.slots.append(request.slot)
        draft.starts.append(start)
        draft.lengths.append(length)
        draft.samples.append(samples)
        if request.sampling.prompt_logprobs is not None:
            # As the runners do: the last prompt position predicts the first answer token.
            draft.num_logprob_rows += max(min(end, request.num_prompt - 1) - start, 0)
        for column in self._residents.share(request, draft.step):
            self._table_changes.append((request, column))
        if end == num_known:
            self._prefilling.remove(request)
            if num_known + 1 < request.max_tokens_total:
                request.state = State.DECODING
                self._decode.add(request, draft.step + 1)
            else:
                request.state = State.ENDING
                draft.last.append((request, len(draft.sampled) if samples else -1))
        if samples:
            draft.sampled.append(request)
            draft.best_only &= request.sampling.takes_best
        self._stats.prompt_tokens += length

    # Results

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take the results of the oldest planned step; returns what it adds to each request."""
        draft = self._in_flight.popleft()
        assert draft.step == plan.step, "steps are committed in the order in which they are planned"
        for row, entries in result.prompt_logprobs.items():
            request = draft.requests[row]
            if request.prompt_logprobs is not None and not request.answered:
                request.prompt_logprobs += entries
        outputs: list[RequestOutput | None] = []  # by index into the sampled rows; None: ignored
        num_ignored = 0
        for request, token_id in zip(draft.sampled, result.token_ids, strict=True):
            if request.ended:
                outputs.append(None)
                num_ignored += 1
                continue
            request.tokens.append(token_id)
            output = RequestOutput(request.request_id, [token_id])
            outputs.append(output)
            if token_id in request.stop_ids and request.stops_on(token_id):
                output.finish_reason = "stop"
                output.stop_token_id = token_id
                self._end(request)
        self._stats.generated_tokens += len(outputs) - num_ignored
        for index, logprobs in result.logprobs.items():
            if (logged := outputs[index]) is not None:
                logged.logprobs = [logprobs]
        for index in range(draft.num_decodes, len(outputs)):
            if (prefilled := outputs[index]) is not None:
                self._complete_first(draft.sampled[index], prefilled)
        for request, index in draft.last:
            if not request.ended:
                self._finish_at_limit(request, index, outputs)
        return [output for output in outputs if output is not None]

    def _finish_at_limit(
        self, request: Request, index: int, outputs: list[RequestOutput | None]
    ) -> None:
        if index < 0:  # max_tokens=0: only the prompt was asked for
            index = len(outputs)
            output = RequestOutput(request.request_id, [])
            self._complete_first(request, output)
            outputs.append(output)
        last = outputs[index]
        assert last is not None
        last.finish_reason = "length"
        self._end(request)

    @staticmethod
    def _complete_first(request: Request, output: RequestOutput) -> None:
        """Add what a request's first output carries."""
        if request.answered:
            return
        output.num_cached_tokens = request.num_cached
        if request.prompt_logprobs is not None:
            # An entry after the prompt's last position would be of the answer.
            output.prompt_logprobs = request.prompt_logprobs[: request.num_prompt - 1]
            assert len(output.prompt_logprobs) == request.num_prompt - 1
        request.answered = True

    def stats(self) -> EngineStats:
        """Gauges now and counters since the start; a copy."""
        stats: EngineStats = msgspec.structs.replace(self._stats)
        stats.num_running = len(self._residents.running)
        stats.num_waiting = len(self._waiting)
        stats.kv_pages_free = self._residents.num_free_pages
        stats.kv_pages_cached = self._residents.num_cached_pages
        return stats

    def check(self) -> None:
        """Assert that pages, locks, slots, queues and calendars agree with the requests."""
        self._residents.check()
        self._decode.check(self._planned + 1)
        by_state: dict[State, list[Request]] = {state: [] for state in State}
        for request in self._live.values():
            by_state[request.state].append(request)
            assert request.ended == (request.state is State.ENDED)
            resident = request in self._residents.running
            assert resident == (request.slot >= 0) == bool(request.pages)
            assert resident or request.state in (State.WAITING, State.ENDING)
        assert set(self._residents.running) <= set(self._live.values())
        self._waiting.check()
        assert list(self._waiting.by_age()) == sorted(by_state[State.WAITING], key=age_key)
        assert set(self._prefilling) == set(by_state[State.PREFILLING])
        assert set(self._decode.requests) == set(by_state[State.DECODING])
        assert not by_state[State.ENDED], "an ended request is live"
        ending = {request for draft in self._in_flight for request, _ in draft.last}
        assert set(by_state[State.ENDING]) <= ending
        assert all(request in self._waiting for request in self._blocked)
