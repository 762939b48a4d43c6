"""Tensor parallelism with the experts spread over ranks: `ep` groups of whole experts, each expert
cut over the tp / ep ranks of a group. Attention is cut over all ranks.
"""

from core.errors import PlanError
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.settings.config import ParallelConfig
from plugins.parallel._settings import absent_problems, divisor_problems


def make_plan(options: NoOptions, parallel: ParallelConfig) -> Plan:
    """The plan of `parallel=tpN_epM`. Raises PlanError naming every setting that contradicts it."""
    dp_attention = (parallel.dp_attention, 1, "data-parallel attention")
    problems = [
        *divisor_problems("parallel.ep", parallel.ep, parallel),
        *divisor_problems("parallel.dense_tp", parallel.dense_tp, parallel),
        *absent_problems("tp_ep", {"parallel.dp_attention": dp_attention}),
    ]
    if problems:
        raise PlanError(problems)
    return Plan(
        tp_attn=parallel.tp,
        ep=parallel.ep,
        tp_expert=parallel.tp // parallel.ep,
        tp_dense=parallel.dense_tp,
        redundant_experts=parallel.redundant_experts,
    )
