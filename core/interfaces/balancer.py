"""What chooses which of several equals gets a request: the DP ranks of one engine.

Plain data in, a number out. Knows nothing of sockets, of text or of how a rank is reached, so that
replicas behind a router can be chosen among by the same contract.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.interfaces.messages import EngineStats


@dataclass(frozen=True, slots=True)
class BalancerSpec:
    """What a balancer is built for. Ranks are numbered from 0; their number stays."""

    num_ranks: int
    block_tokens: int  # what each of `RequestView.prefix_hashes` is longer than the one before


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a balancer may know of a request."""

    request_id: str  # unique among live requests
    num_prompt_tokens: int
    max_tokens: int  # of the answer
    fills_max_tokens: bool  # no end-of-sequence or stop token ends it sooner
    priority: int  # of those that wait in a rank's queue the lowest is computed first
    # Hashes of the prompt's first block, of its first two, and so on, whole blocks only. Equal
    # beginnings have equal hashes, within one process. Computed when it is called.
    prefix_hashes: Callable[[], Sequence[int]]


class Balancer(Protocol):
    """Chooses a rank for each request and is told what becomes of it.

    Called in the event loop that serves all requests, for one request at a time: every method has
    to return in microseconds and may not block. What `add` raises, or a rank that is not there,
    fails that request alone; what the others raise is logged.
    """

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        """The rank, 0 to `num_ranks - 1`, for a new request; where this raises the request was
        never live. `gauges`: what each rank said of itself last, to be read only: up to a second
        old while it works, and without the requests that it was sent since."""
        ...

    def progress(self, request_id: str, num_tokens: int) -> None:
        """A live request got so many tokens more."""
        ...

    def remove(self, request_id: str, *, finished: bool) -> None:
        """A live request ended: by itself, or (not `finished`) because nobody wants it, or because
        `add` named a rank that is not there."""
        ...
