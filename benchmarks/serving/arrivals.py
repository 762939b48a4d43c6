"""Which requests are sent when: seeded, so that every server is given the same ones.

Pure. A prompt is a list of token ids, so that its length is exact for every tokenizer. Nothing
repeats between prompts but what a conversation shares on purpose.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

LOWEST_ID = 300  # below it lie special tokens and single bytes, in most vocabularies
HIGHEST_ID = 100_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One request, sent so many seconds after the former turn's answer ended."""

    prompt: list[int]
    new_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns one after the other; the first is sent at `at_s` after the load's begin."""

    at_s: float
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Load:
    """What one server is given. `rate`: conversations a second, 0: all at once."""

    name: str
    rate: float
    conversations: list[Conversation]

    @property
    def num_requests(self) -> int:
        return sum(len(each.turns) for each in self.conversations)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and of an answer, and the vocabulary that prompts are drawn from."""

    prompt: int
    answer: int
    vocab: int


def token_ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    """Ordinary tokens, drawn alike."""
    highest = min(vocab, HIGHEST_ID)
    return rng.choices(range(min(LOWEST_ID, highest // 2), highest), k=count)


def poisson_times(rng: random.Random, rate: float, count: int) -> list[float]:
    """Seconds at which arrivals of so many a second come, by chance; all 0 without a rate."""
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        times.append(now)
    return times


def singles(name: str, seed: object, count: int, rate: float, lengths: Lengths) -> Load:
    """Requests that have nothing to do with each other."""
    rng = random.Random(f"{seed}/{name}")

    def turn() -> Turn:
        return Turn(token_ids(rng, lengths.prompt, lengths.vocab), lengths.answer)

    times = poisson_times(rng, rate, count)
    return Load(name, rate, [Conversation(at_s, [turn()]) for at_s in times])


def multi_turn(
    name: str,
    seed: object,
    count: int,
    rate: float,
    lengths: Lengths,
    *,
    turns: int,
    shared_tokens: int,
    pause_s: float,
) -> Load:
    """Conversations of so many turns over one beginning that all share (a system prompt). A turn's
    prompt is the former one, as many made-up tokens as its answer had, and `lengths.prompt` new
    ones: made up, as engines answer differently and all are to be asked the same. Pauses between
    turns are drawn around `pause_s`."""
    rng = random.Random(f"{seed}/{name}")
    shared = token_ids(rng, shared_tokens, lengths.vocab)

    def turns_of() -> list[Turn]:
        made: list[Turn] = []
        prompt: list[int] = shared
        for _ in range(turns):
            prompt = prompt + token_ids(rng, lengths.prompt, lengths.vocab)
            pause = rng.expovariate(1 / pause_s) if made and pause_s else 0.0
            made.append(Turn(prompt, lengths.answer, pause))
            prompt = prompt + token_ids(rng, lengths.answer, lengths.vocab)
        return made

    return Load(
        name, rate, [Conversation(at_s, turns_of()) for at_s in poisson_times(rng, rate, count)]
    )


def longest_sequence(loads: Sequence[Load]) -> int:
    """Most tokens of a prompt and its answer together."""
    return max(
        len(turn.prompt) + turn.new_tokens
        for load in loads
        for each in load.conversations
        for turn in each.turns
    )
