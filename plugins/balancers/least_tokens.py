"""Requests go to the rank that has the fewest tokens to compute."""

from collections.abc import Sequence

from core.interfaces.balancer import BalancerSpec, RequestView
from core.interfaces.messages import EngineStats
from core.plugin.hookspecs import NoOptions
from plugins.balancers._loads import ExpectedLoads


class LeastTokens(ExpectedLoads):
    """Implements core.interfaces.balancer.Balancer: the rank with the least load.

    As long as nothing ends, no two ranks differ by more than one request's load.
    """

    def __init__(self, options: NoOptions, spec: BalancerSpec) -> None:
        super().__init__(spec.num_ranks)

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        return self.assign(self.least(), request, request.num_prompt_tokens)
