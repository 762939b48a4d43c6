"""The plugin: a plan in which attention is cut over a fixed number of neighbouring ranks.

The built-in `dp_attention` fixes the number of attention groups; here their size is fixed, so that
more ranks mean more groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import PlanError
from core.parallel.plan import Plan
from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import ParallelConfig


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """parallel.options of this plan."""

    attention_ranks: int = 2  # ranks that share the attention of a request

    def __post_init__(self) -> None:
        if self.attention_ranks < 1:
            raise ValueError(
                f"attention_ranks={self.attention_ranks} is out of range; allowed: at least 1"
            )


def make_plan(options: AcmeOptions, parallel: ParallelConfig) -> Plan:
    """Groups of `attention_ranks`, and whole experts on each of the `parallel.tp` ranks."""
    problems = []
    if parallel.tp % options.attention_ranks != 0:
        problems.append(
            f"parallel.options.attention_ranks={options.attention_ranks} does not divide "
            f"parallel.tp={parallel.tp}; set one of them to fit the other"
        )
    for key, value in (("ep", parallel.ep), ("dp_attention", parallel.dp_attention)):
        if value not in (1, parallel.tp):
            problems.append(f"parallel.{key}={value}: this plan sets it; leave it out")
    if problems:
        raise PlanError(problems)
    return Plan(
        dp=parallel.tp // options.attention_ranks,
        tp_attn=options.attention_ranks,
        ep=parallel.tp,
        redundant_experts=parallel.redundant_experts,
    )


@hookimpl
def register_parallel_plan() -> Sequence[Registration]:
    """One plan."""
    return [
        Registration(
            name="acme",
            factory="acme_plan:make_plan",
            config=AcmeOptions,
            summary="attention groups of a fixed size, whole experts on every rank",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds parallel/acme.yaml."""
    return ["pkg://acme_plan.conf"]
