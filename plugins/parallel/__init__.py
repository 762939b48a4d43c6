"""Parallelism plans: `tp` splits every layer over all ranks. Knows nothing of models."""

from collections.abc import Sequence

from core.hookspecs import Registration, hookimpl


@hookimpl
def register_parallel_plan() -> Sequence[Registration]:
    """The plans in this package."""
    return [
        Registration(
            name="tp",
            factory="plugins.parallel.tp:make_plan",
            summary="plain tensor parallelism: attention, dense layers and experts over all ranks",
        )
    ]
