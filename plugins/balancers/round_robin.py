"""Requests go to one rank after the other, whatever these do."""

from collections.abc import Sequence

from core.interfaces.balancer import BalancerSpec, RequestView
from core.interfaces.messages import EngineStats
from core.plugin.hookspecs import NoOptions


class RoundRobin:
    """Implements core.interfaces.balancer.Balancer."""

    def __init__(self, options: NoOptions, spec: BalancerSpec) -> None:
        self._num_ranks = spec.num_ranks
        self._next = 0

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        rank = self._next
        self._next = (rank + 1) % self._num_ranks
        return rank

    def progress(self, request_id: str, num_tokens: int) -> None:
        pass

    def remove(self, request_id: str, *, finished: bool) -> None:
        pass
