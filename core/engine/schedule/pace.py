"""What a step costs on this machine, measured at start by running made-up ones.

On a CPU a step of the largest size may take a minute, in which nobody gets a token and nobody can
say whether it is healthy. So what a token, a token of context and a row of prompt logprobs cost is
measured once, and steps are cut to a time. Knows nothing of requests or of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from core.engine.step.profile_steps import GREEDY, step
from core.interfaces.messages import ScheduledStep, StepFacts

FIRST_TOKENS = 16  # of the smallest step that is timed
MOST_TOKENS = 512  # of the largest
LONG_ENOUGH_S = 0.06  # a step that takes so long tells the speed
CONTEXT_TOKENS = 2048  # cached before the tokens of a timed step, where the model allows
# Of a timed step at most and at least, lest a disturbed measurement tell nonsense.
MOST_BASE, LEAST_TOKEN = 0.75, 0.1
WITH_LOGPROBS = structs.replace(GREEDY, logprobs=0)  # made-up prompts want theirs then

# Runs of a step that was timed agree where they differ by no more than this; else others follow.
AGREE, MOST_RUNS, LONGEST_RUNS_S = 1.15, 5, 1.0
# A step's time in costs that every step has, and its bounds. A short prompt alone costs about two
# of them: one that waits for the rest of a long step, and then shares one, waits ten times as long.
BASE_COSTS = 15
SHORTEST_STEP_S, LONGEST_STEP_S = 0.1, 0.5

# Runs such a step in every DP rank and returns its seconds, the same on every rank.
Timed = Callable[[ScheduledStep], float]


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step by what it holds. All zero: not known, and nothing is cut to a time."""

    token_s: float = 0.0  # of a token, wherever it stands
    pair_s: float = 0.0  # of a token for each one before it: attention
    logprob_s: float = 0.0  # of a row of prompt logprobs, beside its token
    base_s: float = 0.0  # of every step, whatever it holds: weights are read, kernels begun

    @property
    def known(self) -> bool:
        return self.token_s > 0

    def worthwhile_s(self, slowness: float = 1.0) -> float:
        """How long a step with prompts should take: so long that what every step costs is a small
        part of it, and short enough for those who wait for its end. `slowness`: of late, against
        this pace."""
        return min(max(BASE_COSTS * self.base_s * slowness, SHORTEST_STEP_S), LONGEST_STEP_S)

    def prompt_s(self, start: int, length: int, with_logprobs: bool) -> float:
        """Of so many tokens of a prompt from position `start` on."""
        each = self.token_s + (self.logprob_s if with_logprobs else 0.0)
        return length * (each + self.pair_s * (start + length / 2))

    def prompt_tokens(self, start: int, seconds: float, with_logprobs: bool) -> int:
        """How many tokens from position `start` on take so long. Only where it is known."""
        each = self.token_s + (self.logprob_s if with_logprobs else 0.0)
        linear, half = each + self.pair_s * start, self.pair_s / 2
        if seconds <= 0:
            return 0
        # Of half * n^2 + linear * n = seconds the positive root, in the form that divides by no
        # small number.
        root = (linear * linear + 4 * half * seconds) ** 0.5
        return int(2 * seconds / (linear + root))

    def decode_s(self, starts: list[int]) -> float:
        """Of one token each at these positions."""
        return len(starts) * self.token_s + self.pair_s * sum(starts)

    def step_s(self, scheduled: ScheduledStep, facts: StepFacts) -> float:
        """Of a whole step; other DP ranks may have more to do than this scheduled says."""
        if not self.known:
            return 0.0
        pairs = sum(
            length * (start + length / 2)
            for start, length in zip(scheduled.starts, scheduled.lengths, strict=True)
        )
        tokens, logprobs = max(facts.rows), max(facts.logprob_rows)
        rest_s = tokens * self.token_s + pairs * self.pair_s + logprobs * self.logprob_s
        return self.base_s + rest_s


def measure_pace(timed: Timed, *, step_tokens: int, context_tokens: int) -> Pace:
    """Time a few steps of one prompt, of at most `step_tokens`, and of at most `context_tokens`
    with what is before them; some tenths of a second in all, unless the machine is slow.

    Every rank calls it at once, and as `timed` gives all the same seconds all run the same steps.
    """
    num, seconds = _long_enough(timed, min(MOST_TOKENS, step_tokens, context_tokens))
    context = min(CONTEXT_TOKENS, context_tokens - num)
    pair_s = 0.0
    if context >= num:
        longer_s = _quickest(timed, step(prompts=[(context, num)]))
        pair_s = max(longer_s - seconds, 0.0) / (num * context)
    logprob_s = 0.0
    if num > 1:
        with_logprobs = step(prompts=[(0, num)], sampling=WITH_LOGPROBS)
        logprob_s = max(timed(with_logprobs) - seconds, 0.0) / (num - 1)
    base_s = 0.0
    if num > 1:
        half = num // 2
        half_s = _quickest(timed, step(prompts=[(0, half)]))
        flat_s, half_flat_s = (
            total_s - pair_s * tokens * tokens / 2
            for total_s, tokens in ((seconds, num), (half_s, half))
        )
        base_s = (num * half_flat_s - half * flat_s) / (num - half)
        base_s = min(max(base_s, 0.0), MOST_BASE * seconds)
    token_s = (seconds - base_s) / num - pair_s * num / 2
    return Pace(max(token_s, LEAST_TOKEN * seconds / num), pair_s, logprob_s, base_s)


def _long_enough(timed: Timed, most_tokens: int) -> tuple[int, float]:
    """The size and the seconds of a step that takes long enough to tell, run twice."""
    num = min(FIRST_TOKENS, most_tokens)
    while True:
        seconds = timed(step(prompts=[(0, num)]))
        if seconds >= LONG_ENOUGH_S or num == most_tokens:
            return num, _quickest(timed, step(prompts=[(0, num)]), seconds)
        num = min(2 * num, most_tokens)


def _quickest(timed: Timed, scheduled: ScheduledStep, *before_s: float) -> float:
    """The least of several runs, `before_s` among them: of two that agree where nothing disturbs
    them, of more where something does."""
    runs_s = sorted(before_s)
    while len(runs_s) < 2 or (
        runs_s[1] > AGREE * runs_s[0] and len(runs_s) < MOST_RUNS and sum(runs_s) < LONGEST_RUNS_S
    ):
        runs_s = sorted([*runs_s, timed(scheduled)])
    return runs_s[0]
