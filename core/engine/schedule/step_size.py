"""How much of prompts a step takes: tokens beside decodes, and time where the pace is known.

Knows nothing of pages, nor of which prompts come first.
"""

from collections.abc import Iterable

from core.engine.schedule.pace import LONGEST_STEP_S, Pace
from core.engine.schedule.prompt_budget import LEAST_BASE_COSTS, LEAST_SHARE, PromptBudget
from core.engine.schedule.request import Request
from core.settings.config import EngineConfig

# How much a step's time may differ from what the pace says, and what one step counts of late. The
# pace may have been measured while the machine had ten times as much to do.
LEAST_SLOWNESS, MOST_SLOWNESS, SLOWNESS_WEIGHT = 0.1, 3.0, 0.2
# Most steps that the prompts which wait are spread over for the sake of those that decode.
BACKLOG_STEPS = 4
UNKNOWN_PACE = Pace()


class StepSize:
    """Of one scheduler's steps; learns from those that took place."""

    def __init__(self, config: EngineConfig, pace: Pace, mixed_tokens: int | None) -> None:
        self._chunk_tokens = config.chunked_prefill_size
        self._step_prefill_tokens = config.max_prefill_tokens
        self._mixed_tokens = mixed_tokens
        self._burst_tokens = 0  # prompt tokens of a step with decodes, since none waited
        self._chosen_step_s = config.cpu_step_s
        self._pace = UNKNOWN_PACE if config.cpu_step_s == 0 else pace
        self._slowness = 1.0  # of late, against the pace

    def no_prompts_wait(self) -> None:
        """A burst is over."""
        self._burst_tokens = 0

    def budget(
        self, backlog: int, decode_starts: list[int], *, beside_decodes: bool
    ) -> PromptBudget:
        """What a step has for prompts, which have about `backlog` tokens to compute, beside decodes
        at those positions. `beside_decodes`: others wait for the step."""
        return PromptBudget(
            tokens=self._prompt_tokens(backlog, beside_decodes=beside_decodes),
            chunk=self._chunk_tokens,
            seconds=self._prompt_s(decode_starts),
            pace=self._pace,
        )

    def takes(self, prompts: Iterable[Request], seconds: float) -> bool:
        """Whether prompts would take so long, as far as the pace is known."""
        if not self._pace.known:
            return False
        left_s = 0.0
        for request in prompts:
            left_s += self._pace.prompt_s(
                request.num_computed, request.tokens_left, request.wants_prompt_logprobs
            )
            if left_s >= seconds:
                return True
        return False

    @property
    def step_s(self) -> float:
        """How long a step with prompts should take now, where the pace is known."""
        if self._chosen_step_s is not None:
            return self._chosen_step_s
        return self._pace.worthwhile_s(self._slowness)

    def observe(self, expected_s: float, actual_s: float) -> None:
        """A step with prompts took so long. A machine has other things to do now and then, also
        while the pace was measured."""
        ratio = min(max(actual_s / expected_s, LEAST_SLOWNESS), MOST_SLOWNESS)
        self._slowness += SLOWNESS_WEIGHT * (ratio - self._slowness)

    def _prompt_tokens(self, backlog: int, *, beside_decodes: bool) -> int:
        """Prompt tokens of a step. Beside decodes the backlog is spread evenly over steps of about
        `mixed_tokens`, lest decodes wait long, but over no more than a few, lest prompts do: each
        step costs its launches and its decodes. Steps don't shrink until no prompt waits."""
        most = self._step_prefill_tokens
        if self._mixed_tokens is None or not beside_decodes:
            return most
        num_steps = min(max(round(backlog / self._mixed_tokens), 1), BACKLOG_STEPS)
        # What is known of prompts that wait may be too little: the cache may lose what it had.
        least = self._mixed_tokens * 3 // 4
        self._burst_tokens = max(-(-backlog // num_steps), least, 1, self._burst_tokens)
        return min(self._burst_tokens, most)

    def _prompt_s(self, decode_starts: list[int]) -> float:
        """Seconds at the pace that a step has for prompts, beside its decodes. What makes a step
        worth its cost may be long where the machine was busy when the pace was measured, and takes
        no longer than the longest of steps."""
        step_s, base_s = self.step_s / self._slowness, self._pace.base_s
        left_s = step_s - base_s - self._pace.decode_s(decode_starts)
        worthwhile_s = min(LEAST_BASE_COSTS * base_s, LONGEST_STEP_S / self._slowness)
        return max(left_s, LEAST_SHARE * step_s, worthwhile_s)
