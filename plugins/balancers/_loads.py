"""What ranks still have to compute, by what is expected of their requests.

A rank's *load* is the tokens it is expected to compute still: of each live request the prompt,
until its first token came, and what is left of its answer. How long an answer gets is guessed from
those that ended lately, and known at most to be `max_tokens`.
"""

from core.interfaces.balancer import RequestView

FIRST_GUESS_TOKENS = 256  # of an answer, before any ended
GUESS_DECAY = 0.95  # weight of the guess so far when another answer ends
LEAST_LEFT_TOKENS = 16  # of an answer that has outlived the guess and may go on


class _Live:
    """What is expected of one request."""

    __slots__ = ("fills_max_tokens", "generated", "load", "max_tokens", "rank")

    def __init__(self, rank: int, request: RequestView) -> None:
        self.rank = rank
        self.load = 0  # its share of the rank's
        self.generated = 0
        self.max_tokens = request.max_tokens
        self.fills_max_tokens = request.fills_max_tokens


class ExpectedLoads:
    """The loads of all ranks; a balancer adds how it chooses by them."""

    def __init__(self, num_ranks: int) -> None:
        self.loads = [0] * num_ranks
        self._chosen = [0] * num_ranks  # by rank: the number of the last request it got
        self._num_added = 0
        self._live: dict[str, _Live] = {}
        self._guess = float(FIRST_GUESS_TOKENS)

    def progress(self, request_id: str, num_tokens: int) -> None:
        live = self._live[request_id]
        live.generated += num_tokens
        self._set_load(live, self._left(live))

    def remove(self, request_id: str, *, finished: bool) -> None:
        live = self._live.pop(request_id)
        self._set_load(live, 0)
        if finished:
            self._guess = GUESS_DECAY * self._guess + (1 - GUESS_DECAY) * live.generated

    def least(self) -> int:
        """The rank with the least load; of equals the one that was chosen longest ago."""
        return min(range(len(self.loads)), key=lambda rank: (self.loads[rank], self._chosen[rank]))

    def assign(self, rank: int, request: RequestView, prompt_tokens: int) -> int:
        """Give a rank a request, of whose prompt it has so many tokens to compute."""
        assert request.request_id not in self._live, request.request_id
        live = self._live[request.request_id] = _Live(rank, request)
        self._set_load(live, prompt_tokens + self._left(live))
        self._num_added += 1
        self._chosen[rank] = self._num_added
        return rank

    def _left(self, live: _Live) -> int:
        """Tokens expected of the rest of an answer."""
        most = max(live.max_tokens - live.generated, 0)
        if live.fills_max_tokens:
            return most
        return min(most, max(int(self._guess) - live.generated, LEAST_LEFT_TOKENS))

    def _set_load(self, live: _Live, load: int) -> None:
        self.loads[live.rank] += load - live.load
        live.load = load
