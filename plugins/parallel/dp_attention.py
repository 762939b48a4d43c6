"""Data-parallel attention: `dp_attention` groups of ranks, each with requests and a KV cache of its
own, cut over the tp / dp_attention ranks of the group; dense layers and experts are spread over all
ranks by settings of their own (`dense_tp`, `ep`).
"""

from core.errors import PlanError
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.settings.config import ParallelConfig
from plugins.parallel._settings import divisor_problems


def make_plan(options: NoOptions, parallel: ParallelConfig) -> Plan:
    """The plan of `parallel=tpN_epM_dpD`. Raises PlanError naming every size that does not fit."""
    problems = [
        *divisor_problems("parallel.dp_attention", parallel.dp_attention, parallel),
        *divisor_problems("parallel.ep", parallel.ep, parallel),
        *divisor_problems("parallel.dense_tp", parallel.dense_tp, parallel),
    ]
    if problems:
        raise PlanError(problems)
    return Plan(
        dp=parallel.dp_attention,
        tp_attn=parallel.tp // parallel.dp_attention,
        ep=parallel.ep,
        tp_expert=parallel.tp // parallel.ep,
        tp_dense=parallel.dense_tp,
        dp_lm_head=parallel.dp_lm_head,
        redundant_experts=parallel.redundant_experts,
    )
