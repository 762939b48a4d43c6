"""What is left of a step for prompts: tokens, and time where the pace of steps is known."""

from core.engine.schedule.pace import Pace

LEAST_TOKENS = 16  # of a chunk that is cut: smaller ones cost their step more than they compute
# Of the time of a step that is left to prompts whatever its decodes take.
LEAST_SHARE = 0.25
# Of what every step costs, that prompts get at least: with less a step would be mostly that.
LEAST_BASE_COSTS = 4


class PromptBudget:
    """Of one step. At least one token of a prompt always fits into a step that has none yet."""

    __slots__ = ("_pace", "chunk", "seconds", "tokens", "used")

    def __init__(self, *, tokens: int, chunk: int, seconds: float, pace: Pace) -> None:
        """`chunk`: most tokens of one prompt; -1: prompts are not cut. `seconds` counts only where
        the pace is known."""
        self.tokens = tokens
        self.chunk = chunk
        self.seconds = seconds
        self.used = 0  # tokens
        self._pace = pace

    @property
    def is_spent(self) -> bool:
        return self.tokens <= 0 or (self.used > 0 and self.seconds <= 0)

    def fitting(self, start: int, wanted: int, with_logprobs: bool) -> int:
        """How many of so many tokens from position `start` on may be computed; 0: none."""
        if self.chunk == -1:
            return wanted if wanted <= self.tokens or not self.used else 0
        most = min(wanted, self.chunk, self.tokens)
        if not self._pace.known:
            return most
        in_time = self._pace.prompt_tokens(start, self.seconds, with_logprobs)
        if in_time >= most:
            return most
        if not self.used:  # however slow the machine is, there is progress
            return min(most, max(in_time, LEAST_TOKENS))
        return in_time if in_time >= LEAST_TOKENS else 0

    def spend(self, start: int, length: int, with_logprobs: bool) -> None:
        """So many tokens were taken."""
        self.used += length
        self.tokens -= length
        self.seconds -= self._pace.prompt_s(start, length, with_logprobs)

    def cost_s(self, start: int, length: int, with_logprobs: bool) -> float:
        return self._pace.prompt_s(start, length, with_logprobs)

    def shorten(self, seconds: float) -> None:
        """Let the step take no longer than this, as far as that is worth its cost."""
        self.seconds = min(self.seconds, max(seconds, LEAST_BASE_COSTS * self._pace.base_s))

    def hold_back(self, tokens: int, seconds: float) -> None:
        """Set some of it apart; negative values give it back."""
        self.tokens -= tokens
        self.seconds -= seconds
