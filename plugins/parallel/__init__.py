"""Parallelism plans: what the settings of `parallel` make of a replica's ranks.

`tp` cuts every layer over all ranks, `tp_ep` spreads experts, `dp_attention` also spreads requests.
Knows nothing of models: whether a model's sizes divide is its family's to say.
"""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import AppConfig
from plugins.parallel._settings import shared_problems


@hookimpl
def register_parallel_plan() -> Sequence[Registration]:
    """The plans in this package."""
    return [
        Registration(
            name="tp",
            factory="plugins.parallel.tp:make_plan",
            summary="plain tensor parallelism: attention, dense layers and experts over all ranks",
        ),
        Registration(
            name="tp_ep",
            factory="plugins.parallel.tp_ep:make_plan",
            summary="tensor parallelism, with whole experts spread over ep groups of ranks",
        ),
        Registration(
            name="dp_attention",
            factory="plugins.parallel.dp_attention:make_plan",
            summary="attention groups with requests of their own; experts over all ranks",
        ),
    ]


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    """Settings of `parallel` that need each other, whatever the plan."""
    return shared_problems(config.parallel)
