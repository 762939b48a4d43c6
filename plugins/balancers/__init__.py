"""Registers the balancers. Imports none of them: that happens when one is chosen."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from plugins.balancers._options import PrefixAwareOptions


@hookimpl
def register_balancer() -> Sequence[Registration]:
    return [
        Registration(
            name="least_tokens",
            factory="plugins.balancers.least_tokens:LeastTokens",
            summary="the rank with the fewest tokens to compute",
        ),
        Registration(
            name="prefix_aware",
            factory="plugins.balancers.prefix_aware:PrefixAware",
            config=PrefixAwareOptions,
            summary="the rank that had the prompt's beginning before, unless it is too busy",
        ),
        Registration(
            name="round_robin",
            factory="plugins.balancers.round_robin:RoundRobin",
            summary="one after the other",
        ),
    ]
