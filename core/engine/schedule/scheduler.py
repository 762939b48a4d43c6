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

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from core.engine.schedule.decode_set import DecodeSet
from core.engine.schedule.intake import Intake
from core.engine.schedule.pace import Pace
from core.engine.schedule.prompt_order import OldestAndShortest, PromptOrder
from core.engine.schedule.prompts import Prompts
from core.engine.schedule.request import Request, State
from core.engine.schedule.running_set import RunningSet
from core.engine.schedule.step_builder import StepBuilder
from core.engine.schedule.step_size import UNKNOWN_PACE, StepSize
from core.engine.schedule.waiting import age_key
from core.interfaces.messages import (
    Abort,
    EngineStats,
    Generate,
    RequestOutput,
    ScheduledStep,
    StepResult,
)
from core.settings.config import EngineConfig

# Tokens that every running request must still have room for when another one is let in.
HEADROOM_TOKENS = 32
EXPIRY_INTERVAL_S = 0.1  # between two looks at deadlines
QUEUE_TIMEOUT = "queue_timeout"  # RequestOutput.error_code of one that waited too long
ORDER = OldestAndShortest()


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
        self._size = StepSize(config, pace, mixed_tokens)
        self._clock = clock
        self._next_expiry_s = 0.0
        self._page_size = config.settled_page_size
        self._dp_rank = dp_rank
        self._running_set = RunningSet(config, num_pages=num_pages, headroom_tokens=headroom_tokens)
        self._intake = Intake(
            config,
            dp_rank=dp_rank,
            max_model_len=max_model_len,
            pool_tokens=self._running_set.num_usable_pages * self._page_size,
            eos_ids=eos_ids,
            clock=clock,
        )
        self._live: dict[str, Request] = {}
        self._decode = DecodeSet(self._page_size)
        # Requests and columns whose page is not announced yet; those without a slot are void.
        self._table_changes: list[tuple[Request, int]] = []
        self._in_flight: deque[StepBuilder] = deque()
        self._planned = 0  # the last planned step
        self._stats = EngineStats(kv_pages_total=self._running_set.num_usable_pages)
        self._prompts = Prompts(
            running_set=self._running_set,
            decode=self._decode,
            size=self._size,
            order=order,
            page_size=self._page_size,
            table_changes=self._table_changes,
            stats=self._stats,
        )

    # Requests come and go

    def admit(self, messages: Iterable[Generate | Abort]) -> list[RequestOutput]:
        """Queue new requests and drop aborted ones; answers those that can never run."""
        answers: list[RequestOutput] = []
        for message in messages:
            if isinstance(message, Abort):
                for request_id in message.request_ids:
                    if (request := self._live.get(request_id)) is not None:
                        self._end(request)
            elif (problem := self._intake.problem(len(message.prompt_ids))) is not None:
                answers.append(
                    RequestOutput(message.request_id, [], finish_reason="error", error=problem)
                )
            else:
                assert message.request_id not in self._live, f"{message.request_id} is live already"
                request = self._intake.request(message)
                self._live[request.request_id] = request
                self._prompts.wait(request, self._planned + 1)
        return answers + self._expire()

    def _expire(self) -> list[RequestOutput]:
        """End requests whose time in the queue is over before they ever ran."""
        now = self._clock()
        if now < self._next_expiry_s or not self._prompts.waiting:
            return []
        self._next_expiry_s = now + EXPIRY_INTERVAL_S
        answers = []
        for request in self._prompts.waiting.by_age():
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

    def _end(self, request: Request) -> None:
        """Forget a finished or aborted request; what steps in flight yield for it is ignored."""
        if request.state is State.WAITING:
            self._prompts.waiting.remove(request)
            self._prompts.pages_came()
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
            self._prompts.prefilling.remove(request)
        self._running_set.leave(request, self._planned)
        self._prompts.pages_came()

    def _make_room(self) -> None:
        """Free a running request's pages: one that is ending anyway, else the latest to arrive of
        those with the highest priority number."""
        for request in self._running_set.running:
            if request.state is State.ENDING:
                self._vacate(request)
                return
        request = max(self._running_set.running, key=age_key)
        self._vacate(request)
        request.state = State.WAITING
        self._prompts.wait(request, self._planned + 1)
        self._stats.num_preemptions += 1

    # Planning a step

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a planned step is not committed."""
        return bool(self._live or self._in_flight)

    @property
    def step_s(self) -> float:
        """How long a step with prompts should take now, where the pace is known."""
        return self._size.step_s

    def observe(self, expected_s: float, actual_s: float) -> None:
        """A step with prompts took so long."""
        self._size.observe(expected_s, actual_s)

    def has_prompts_for(self, seconds: float) -> bool:
        """Whether prompts that run or wait would take so long, as far as the pace is known."""
        return self._size.takes(self._prompts, seconds)

    def next_batch(self, decodes_follow: Sequence[bool] = ()) -> ScheduledStep | None:
        """Plan the next step; None where nothing can run before the step in flight is committed,
        or at all. The lists of a step are never changed afterwards. `decodes_follow`: what each DP
        rank's last step said; this one's own doesn't count."""
        assert len(self._in_flight) < 2, "commit the oldest step first"
        step = self._planned + 1
        decode = self._decode
        starved = self._grow_decodes(step)
        num_decodes = len(decode)
        builder = StepBuilder(
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
        for request, _ in builder.last:
            request.state = State.ENDING
        for request, column in self._table_changes:
            if request.slot >= 0:
                builder.set_page(request, column)
        self._table_changes.clear()
        # Who gave way may still get a token from the step in flight, so nobody enters now; before
        # the next planned step that one is committed.
        others_decode = any(
            follows for dp_rank, follows in enumerate(decodes_follow) if dp_rank != self._dp_rank
        )
        self._prompts.plan(
            builder, may_admit=not starved, beside_decodes=num_decodes > 0 or others_decode
        )
        self._running_set.end_step()
        if not builder.requests:
            assert self._in_flight or not self._prompts.waiting, (
                "requests wait, but nothing can run"
            )
            return None
        self._planned = step
        self._in_flight.append(builder)
        self._stats.num_steps += 1
        return builder.build(decodes_follow=len(decode) > 0)

    def _grow_decodes(self, step: int) -> bool:
        """Give each decode that needs one a page; True where others had to give way."""
        needy = self._decode.pop_needing_page(step)
        if not needy:
            return False
        running_set = self._running_set
        pages = running_set.take(len(needy))
        starved = pages is None
        if pages is None:
            pages = []
            # In order of arrival: whoever gives way to one comes later, and has none yet.
            needy.sort(key=age_key)
            for request in needy:
                while request.slot >= 0:
                    if (page := running_set.take(1)) is not None:
                        pages += page
                        break
                    self._make_room()
            needy = [request for request in needy if request.slot >= 0]
        for request, page_id in zip(needy, pages, strict=True):
            self._table_changes.append((request, len(request.pages)))
            request.pages.append(page_id)
        self._decode.grew(needy, step)
        return starved

    # Results

    def commit(self, scheduled: ScheduledStep, result: StepResult) -> list[RequestOutput]:
        """Take the results of the oldest planned step; returns what it adds to each request."""
        builder = self._in_flight.popleft()
        assert builder.step == scheduled.step, (
            "steps are committed in the order in which they are planned"
        )
        for row, entries in result.prompt_logprobs.items():
            request = builder.requests[row]
            if request.prompt_logprobs is not None and not request.answered:
                request.prompt_logprobs += entries
        outputs: list[RequestOutput | None] = []  # by index into the sampled rows; None: ignored
        num_ignored = 0
        for request, token_id in zip(builder.sampled, result.token_ids, strict=True):
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
        for index in range(builder.num_decodes, len(outputs)):
            if (prefilled := outputs[index]) is not None:
                self._complete_first(builder.sampled[index], prefilled)
        for request, index in builder.last:
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
        stats.num_running = len(self._running_set.running)
        stats.num_waiting = len(self._prompts.waiting)
        stats.kv_pages_free = self._running_set.num_free_pages
        stats.kv_pages_cached = self._running_set.num_cached_pages
        return stats

    def check(self) -> None:
        """Assert that pages, locks, slots, queues and calendars agree with the requests."""
        self._running_set.check()
        self._decode.check(self._planned + 1)
        by_state: dict[State, list[Request]] = {state: [] for state in State}
        for request in self._live.values():
            by_state[request.state].append(request)
            assert request.ended == (request.state is State.ENDED)
            runs = request in self._running_set.running
            assert runs == (request.slot >= 0) == bool(request.pages)
            assert runs or request.state in (State.WAITING, State.ENDING)
        assert set(self._running_set.running) <= set(self._live.values())
        self._prompts.check(by_state)
        assert set(self._decode.requests) == set(by_state[State.DECODING])
        assert not by_state[State.ENDED], "an ended request is live"
        ending = {request for builder in self._in_flight for request, _ in builder.last}
        assert set(by_state[State.ENDING]) <= ending
