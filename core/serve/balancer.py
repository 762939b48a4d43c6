"""Which DP rank gets a request. Pure Python; knows nothing of sockets or of text.

A rank's *load* is the tokens it is expected to compute still: of each live request the prompt,
until its first token came, and what is left of its answer. How long an answer gets is guessed from
those that ended lately, and known at most to be `max_tokens`.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from core.interfaces.messages import SamplingParams
from core.settings.config import DP_BALANCERS

FIRST_GUESS_TOKENS = 256  # of an answer, before any ended
GUESS_DECAY = 0.95  # weight of the guess so far when another answer ends
LEAST_LEFT_TOKENS = 16  # of an answer that has outlived the guess and may go on
# A prefix is looked up in blocks: smaller ones find more and cost more time in the frontend.
BLOCK_TOKENS = 64
BLOCKS_PER_RANK = 16_384  # a million tokens of prompts each
# How much more loaded the rank that knows a prefix may be, besides what the prefix saves it.
MOST_EXTRA_LOAD = 0.25


class Balancer(Protocol):
    """Chooses a DP rank for each request and is told what becomes of it."""

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> int:
        """The DP rank for a new request; its id is not live."""
        ...

    def progress(self, request_id: str, num_tokens: int) -> None:
        """A live request got so many tokens more."""
        ...

    def remove(self, request_id: str, *, finished: bool) -> None:
        """A live request ended: by itself, or (not `finished`) because nobody wants it."""
        ...


class SoloBalancer:
    """There is one DP rank."""

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> int:
        return 0

    def progress(self, request_id: str, num_tokens: int) -> None:
        pass

    def remove(self, request_id: str, *, finished: bool) -> None:
        pass


class RoundRobin(SoloBalancer):
    """One after the other, whatever they do."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._next = 0

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> int:
        rank = self._next
        self._next = (rank + 1) % self._num_ranks
        return rank


class _Live:
    """What is expected of one request."""

    __slots__ = ("generated", "load", "max_tokens", "rank", "will_fill")

    def __init__(self, rank: int, load: int, sampling: SamplingParams) -> None:
        self.rank = rank
        self.load = load  # its share of the rank's
        self.generated = 0
        self.max_tokens = sampling.max_tokens
        self.will_fill = sampling.ignore_eos and not sampling.stop_token_ids


class LeastTokens:
    """The rank with the least load; of equals the one that was chosen longest ago.

    As long as nothing ends, no two ranks differ by more than one request's load.
    """

    def __init__(self, num_ranks: int) -> None:
        self.loads = [0] * num_ranks
        self._chosen = [0] * num_ranks  # by rank: the number of the last request it got
        self._num_added = 0
        self._live: dict[str, _Live] = {}
        self._guess = float(FIRST_GUESS_TOKENS)

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> int:
        return self._assign(self._least(), request_id, len(prompt_ids), sampling)

    def progress(self, request_id: str, num_tokens: int) -> None:
        live = self._live[request_id]
        live.generated += num_tokens
        self._set_load(live, self._left(live))

    def remove(self, request_id: str, *, finished: bool) -> None:
        live = self._live.pop(request_id)
        self._set_load(live, 0)
        if finished:
            self._guess = GUESS_DECAY * self._guess + (1 - GUESS_DECAY) * live.generated

    def _least(self) -> int:
        return min(range(len(self.loads)), key=lambda rank: (self.loads[rank], self._chosen[rank]))

    def _assign(
        self, rank: int, request_id: str, prompt_tokens: int, sampling: SamplingParams
    ) -> int:
        """Give a rank a request, of whose prompt it has so many tokens to compute."""
        assert request_id not in self._live, request_id
        live = self._live[request_id] = _Live(rank, 0, sampling)
        self._set_load(live, prompt_tokens + self._left(live))
        self._num_added += 1
        self._chosen[rank] = self._num_added
        return rank

    def _left(self, live: _Live) -> int:
        """Tokens expected of the rest of an answer."""
        most = max(live.max_tokens - live.generated, 0)
        if live.will_fill:
            return most
        return min(most, max(int(self._guess) - live.generated, LEAST_LEFT_TOKENS))

    def _set_load(self, live: _Live, load: int) -> None:
        self.loads[live.rank] += load - live.load
        live.load = load


class PrefixAware(LeastTokens):
    """The rank that has computed the longest part of the prompt before, unless it is too busy: its
    load may be above the least by a quarter and by the tokens it need not compute again.

    Remembers prompts, not what ranks really keep; `blocks_per_rank` bounds the memory.
    """

    def __init__(self, num_ranks: int, blocks_per_rank: int = BLOCKS_PER_RANK) -> None:
        super().__init__(num_ranks)
        self._blocks_per_rank = blocks_per_rank
        # By rank: hashes of prefixes, the least recently used first.
        self._known: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_ranks)]

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> int:
        prefixes = list(_prefixes(prompt_ids))
        rank = self._choose(prefixes)
        known_tokens = self._num_known(rank, prefixes) * BLOCK_TOKENS
        self._remember(rank, prefixes)
        return self._assign(rank, request_id, len(prompt_ids) - known_tokens, sampling)

    def _choose(self, prefixes: list[int]) -> int:
        least = self._least()
        base = self._num_known(least, prefixes)
        allowed = self.loads[least] * (1 + MOST_EXTRA_LOAD)
        best = (base, -self.loads[least], least)
        for rank, load in enumerate(self.loads):
            num_known = self._num_known(rank, prefixes)
            if num_known > base and load <= allowed + (num_known - base) * BLOCK_TOKENS:
                best = max(best, (num_known, -load, rank))
        return best[2]

    def _num_known(self, rank: int, prefixes: list[int]) -> int:
        known = self._known[rank]
        for count, prefix in enumerate(prefixes):
            if prefix not in known:
                return count
        return len(prefixes)

    def _remember(self, rank: int, prefixes: list[int]) -> None:
        known = self._known[rank]
        for prefix in reversed(prefixes):  # the longest is forgotten first
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > self._blocks_per_rank:
            known.popitem(last=False)


def _prefixes(prompt_ids: Sequence[int]) -> Iterator[int]:
    """A hash of the first block, of the first two... Python keys it at random in each process."""
    packed = array("i", prompt_ids)
    block_bytes = BLOCK_TOKENS * packed.itemsize
    data = packed.tobytes()
    prefix = 0
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        prefix = hash((prefix, data[start : start + block_bytes]))
        yield prefix


def make_balancer(name: str, num_ranks: int) -> Balancer:
    """The balancer called `name` (parallel.dp_balancer) over DP ranks 0 .. num_ranks - 1."""
    if num_ranks == 1:
        return SoloBalancer()
    makers: dict[str, Callable[[int], Balancer]] = {
        "least_tokens": LeastTokens,
        "round_robin": RoundRobin,
        "prefix_aware": PrefixAware,
    }
    assert set(makers) == set(DP_BALANCERS)
    return makers[name](num_ranks)
