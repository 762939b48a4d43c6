"""When the step that a GPU computes will end, by what steps like it took lately.

The next step is best planned shortly before that: whoever comes until then is in it, instead of
waiting for a further step that was planned without them. What is foreseen had better be too short
than too long, as the device idles where a plan comes too late. Knows nothing of requests.
"""

import time
from collections.abc import Callable
from typing import Protocol

from core.interfaces.messages import StepPlan

# Of what is foreseen, that is waited for at most.
TRUSTED_SHARE = 0.95
# A step for which nobody had to wait ended before anybody looked: it was foreseen too long.
LEAST_WAIT_S = 2e-4
SHRINKING = 0.8
# What is known grows by no more at once, however long a step took: the machine may have had other
# things to do. One that took less counts whole.
GROWING = 1.1
# Fewer prompt tokens than this say nothing about what one costs.
LEAST_TOKENS = 128
MOST_WAIT_S = 0.1


class Foresight(Protocol):
    """Of the steps of one loop; times are of `time.monotonic`."""

    def expected_s(self, plan: StepPlan) -> float:
        """Seconds that a step will take; 0: not known."""
        ...

    def observe(self, plan: StepPlan, seconds: float, waited_s: float) -> None:
        """A step took so long, of which its tokens were waited for so long."""
        ...

    def wait(self, begun_s: float, expected_s: float) -> None:
        """Block until the step after the one that began then is to be planned."""
        ...


class Blind:
    """Implements Foresight: each step is planned as soon as the one before it runs."""

    def expected_s(self, plan: StepPlan) -> float:
        return 0.0

    def observe(self, plan: StepPlan, seconds: float, waited_s: float) -> None:
        pass

    def wait(self, begun_s: float, expected_s: float) -> None:
        pass


class LastSteps:
    """Implements Foresight for a device whose decode steps change slowly, and on which prompts add
    a time that grows with their tokens."""

    def __init__(
        self,
        margin_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`margin_s`: before the end of a step, for planning and launching the next one."""
        self._margin_s = margin_s
        self._clock, self._sleep = clock, sleep
        self._decode_s, self._decode_rows = 0.0, 1  # of a step that only decodes
        self._token_s = 0.0  # of a prompt's token, beside the decodes of its step

    def expected_s(self, plan: StepPlan) -> float:
        num_prompt = sum(plan.lengths[plan.num_decodes :])
        if not num_prompt:
            return self._decodes_s(plan.num_decodes)
        if not self._token_s:
            return 0.0
        return self._decodes_s(plan.num_decodes) + num_prompt * self._token_s

    def observe(self, plan: StepPlan, seconds: float, waited_s: float) -> None:
        num_prompt = sum(plan.lengths[plan.num_decodes :])
        was_late = waited_s < LEAST_WAIT_S
        if not num_prompt:
            known = self._decodes_s(plan.num_decodes)
            self._decode_s = _learnt(known, seconds, was_late)
            self._decode_rows = plan.num_decodes
        elif num_prompt >= LEAST_TOKENS:
            each = (seconds - self._decodes_s(plan.num_decodes)) / num_prompt
            if each > 0:
                self._token_s = _learnt(self._token_s, each, was_late)

    def wait(self, begun_s: float, expected_s: float) -> None:
        until_s = begun_s + TRUSTED_SHARE * expected_s - self._margin_s
        left_s = min(until_s - self._clock(), MOST_WAIT_S)
        if left_s > 0:
            self._sleep(left_s)

    def _decodes_s(self, num_rows: int) -> float:
        """Fewer rows may take as long, or less by their number."""
        return self._decode_s * min(1.0, num_rows / self._decode_rows)


def _learnt(known: float, seen: float, was_late: bool) -> float:
    if was_late:
        return SHRINKING * min(known or seen, seen)
    if not known or seen < known:
        return seen
    return min(seen, GROWING * known)
