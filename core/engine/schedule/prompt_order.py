"""Which prompts get a step's prompt tokens: half for the oldest, half for the shortest.

With the oldest first alone, a short prompt waits for every long one before it, a minute on a slow
machine. With the shortest first alone, long ones may wait for ever. Here the oldest gets as much of
every step as all shorter ones together, so that nothing starves and nothing waits more than twice
as long as without the others, and what is short passes everything that is long. Pure.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from core.engine.schedule.prompt_budget import PromptBudget
from core.engine.schedule.request import Request
from core.engine.schedule.waiting import WaitingQueue, age_key

# Of a step's prompt tokens, that shorter prompts may take from the oldest one.
SHORT_SHARE = 0.5
# Of a step's time, that the oldest prompt gets at least beside shorter ones: where steps are cut to
# a time, one with short prompts is made shorter, as they wait for its end.
LONG_SHARE = 0.25

ROUNDING = 1.001  # lest a token too few fits into the time that was set apart

MayEnter = Callable[[Request], bool]  # whether a waiting request is worth trying


class PromptOrder(Protocol):
    """Decides in which order requests are offered what a step's prompt budget has left."""

    def passes(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        budget: PromptBudget,
        may_enter: MayEnter,
    ) -> Iterator[Iterator[Request]]:
        """Candidates, pass by pass; one that got tokens in an earlier pass is skipped. Between
        passes the order may set some of the budget apart and give it back."""
        ...


class OldestAndShortest:
    """Implements PromptOrder."""

    def passes(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        budget: PromptBudget,
        may_enter: MayEnter,
    ) -> Iterator[Iterator[Request]]:
        tokens, seconds = _wanted_by_shorter(prefilling, waiting, budget, may_enter)
        if tokens:
            budget.shorten(seconds + max(seconds, LONG_SHARE * budget.seconds))
        budget.hold_back(tokens, seconds)
        yield by_age(prefilling, waiting)
        budget.hold_back(-tokens, -seconds)
        yield by_length(prefilling, waiting)


def by_age(prefilling: Sequence[Request], waiting: WaitingQueue) -> Iterator[Request]:
    """Running and waiting prompts, the oldest first."""
    return heapq.merge(sorted(prefilling, key=age_key), waiting.by_age(), key=age_key)


def by_length(prefilling: Sequence[Request], waiting: WaitingQueue) -> Iterator[Request]:
    """Running and waiting prompts, the one with the least to compute first."""
    return heapq.merge(sorted(prefilling, key=_length_key), waiting.by_length(), key=_length_key)


def _length_key(request: Request) -> tuple[int, int, int]:
    return request.priority, request.tokens_left, request.arrival


def _wanted_by_shorter(
    prefilling: Sequence[Request],
    waiting: WaitingQueue,
    budget: PromptBudget,
    may_enter: MayEnter,
) -> tuple[int, float]:
    """Tokens and seconds that prompts would take that are shorter than the first older one that the
    step has no room for; up to their share."""
    first, passed = _first_to_be_cut(prefilling, waiting, budget)
    if first is None:
        return 0, 0.0
    most_tokens, most_seconds = int(budget.tokens * SHORT_SHARE), budget.seconds * SHORT_SHARE
    tokens, seconds = 0, 0.0
    for request in by_length(prefilling, waiting):
        left = request.tokens_left
        if (request.priority, left) >= (first.priority, first.tokens_left):
            break
        if request in passed or (request.slot < 0 and not may_enter(request)):
            continue
        if budget.chunk != -1:
            left = min(left, budget.chunk)
        tokens += left
        with_logprobs = request.wants_prompt_logprobs
        seconds += ROUNDING * budget.cost_s(request.num_computed, left, with_logprobs)
        if tokens >= most_tokens or (seconds and seconds >= most_seconds):
            break
    return min(tokens, most_tokens), min(seconds, max(most_seconds, 0.0))


def _first_to_be_cut(
    prefilling: Sequence[Request], waiting: WaitingQueue, budget: PromptBudget
) -> tuple[Request | None, set[Request]]:
    """By age the first prompt that does not fit into the step beside the shorter ones' share, and
    those before it; None where all fit."""
    tokens, seconds = budget.tokens * (1 - SHORT_SHARE), budget.seconds * (1 - SHORT_SHARE)
    passed: set[Request] = set()
    for request in by_age(prefilling, waiting):
        left, with_logprobs = request.tokens_left, request.wants_prompt_logprobs
        tokens -= left
        seconds -= budget.cost_s(request.num_computed, left, with_logprobs)
        if tokens < 0 or seconds < 0:
            return request, passed
        passed.add(request)
    return None, passed
