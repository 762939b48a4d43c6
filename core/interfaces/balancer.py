"""The interface of balancers, which choose a DP rank of the engine for each request.

Plain data in, a number out. Knows nothing of sockets, of text, or of how a rank is reached, so the
same interface can choose among replicas behind a router.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.interfaces.messages import EngineStats


@dataclass(frozen=True, slots=True)
class BalancerSpec:
    """What a balancer is built for. Ranks are numbered from 0, and their number does not change."""

    num_ranks: int
    block_tokens: int  # tokens of a block of `RequestView.prefix_hashes`


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a balancer knows of a request."""

    request_id: str  # unique among live requests
    num_prompt_tokens: int
    max_tokens: int  # of the answer
    fills_max_tokens: bool  # no end-of-sequence or stop token can end it before
    priority: int  # requests with the lowest value in a rank's queue are computed first
    # Returns hashes of the first block of the prompt, of the first two blocks, and so on (only
    # whole blocks). In one process, equal prefixes have equal hashes. Computed when called.
    prefix_hashes: Callable[[], Sequence[int]]


class Balancer(Protocol):
    """Chooses a rank for each request, and is told about its progress.

    Called in the event loop that serves all requests, one call at a time. Every method must return
    in microseconds and must not block. If `add` raises or returns a rank that does not exist, only
    that request fails. Exceptions of the other methods are logged.
    """

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        """Return the rank, 0 to `num_ranks - 1`, of a new request.

        If this raises, the request was never live. `gauges` are the latest statistics of each rank,
        read-only. They are up to a second old while a rank works, and do not include requests that
        were sent to it since."""
        ...

    def progress(self, request_id: str, num_tokens: int) -> None:
        """A live request got `num_tokens` more tokens."""
        ...

    def remove(self, request_id: str, *, finished: bool) -> None:
        """A live request ended.

        `finished` is False if it was aborted, or if `add` returned a rank that does not exist."""
        ...
