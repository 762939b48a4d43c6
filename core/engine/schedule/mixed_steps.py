"""How many prompt tokens a step may have in which others decode, on a GPU, by its speed.

All who decode in such a step wait for its prompts, so that its size decides how long the longest
gaps between their tokens are. Pure.
"""

from core.engine.schedule.pace import Timed
from core.engine.step.profile_steps import step

# What a step's prompts may take while few wait.
STEP_S = 0.025
# Less than this leaves a GPU's matrix units idle.
LEAST_TOKENS = 512
MULTIPLE = 256
TIMED_TOKENS = 2048
TIMES = 3


def mixed_tokens(timed: Timed, longest_prompt: int, most: int) -> int:
    """The tokens that take `STEP_S`, of at most `most` that a step may have at all. A prompt of at
    most `longest_prompt` is timed. Every rank calls it at once, and gets the same."""
    num = min(TIMED_TOKENS, longest_prompt)
    scheduled = step(prompts=[(0, num)])
    token_s = min(timed(scheduled) for _ in range(TIMES)) / num
    return fitting(STEP_S, token_s, most)


def fitting(seconds: float, token_s: float, most: int) -> int:
    """Tokens that take about so long, as a multiple that tiles divide."""
    tokens = round(seconds / token_s / MULTIPLE) * MULTIPLE
    return min(max(tokens, LEAST_TOKENS), most)
