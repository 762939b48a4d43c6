"""Prompts with the same beginning meet on one rank, without any memory of prompts.

Each rank draws a number from the beginning's hash; the largest has the request. Source: Thaler and
Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996; the bound on loads is that of
Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018.
"""

import math
from collections.abc import Sequence

from acme_balancer import AcmeOptions
from core.interfaces.balancer import BalancerSpec, RequestView
from core.interfaces.messages import EngineStats


class Rendezvous:
    """Implements core.interfaces.balancer.Balancer."""

    def __init__(self, options: AcmeOptions, spec: BalancerSpec) -> None:
        self._options = options
        self._num_live = [0] * spec.num_ranks
        self._rank_of: dict[str, int] = {}  # of each live request

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        rank = self._choose(self._beginning(request))
        self._rank_of[request.request_id] = rank
        self._num_live[rank] += 1
        return rank

    def progress(self, request_id: str, num_tokens: int) -> None:
        pass

    def remove(self, request_id: str, *, finished: bool) -> None:
        self._num_live[self._rank_of.pop(request_id)] -= 1

    def _beginning(self, request: RequestView) -> int | str:
        """What requests that belong together have in common; short prompts belong to none."""
        hashes = request.prefix_hashes()[: self._options.num_blocks]
        return hashes[-1] if hashes else request.request_id

    def _choose(self, beginning: int | str) -> int:
        mean = (sum(self._num_live) + 1) / len(self._num_live)  # with this request
        most = math.ceil(self._options.most_over_mean * mean)  # the least busy one is below that
        free = [rank for rank, live in enumerate(self._num_live) if live < most]
        return max(free, key=lambda rank: hash((beginning, rank)))
