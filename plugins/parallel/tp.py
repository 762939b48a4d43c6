"""Plain tensor parallelism: one replica, every layer split over all of its ranks.

Whether a model's sizes divide is the model family's to say (`ModelFamily.plan_problems`).
"""

from core.config import ParallelConfig
from core.errors import PlanError
from core.hookspecs import NoOptions
from core.parallel.plan import Plan


def make_plan(options: NoOptions, parallel: ParallelConfig) -> Plan:
    """The plan of `parallel=tpN`. Raises PlanError naming every setting that contradicts it."""
    problems = [
        f"{key}={value}: the plan 'tp' has no {what}; set {key}={neutral}, or another parallel.plan"
        for key, value, neutral, what in (
            ("parallel.ep", parallel.ep, 1, "expert parallelism"),
            ("parallel.dp_attention", parallel.dp_attention, 1, "data-parallel attention"),
            ("parallel.dp_lm_head", parallel.dp_lm_head, False, "data-parallel output head"),
            ("parallel.redundant_experts", parallel.redundant_experts, 0, "redundant experts"),
        )
        if value != neutral
    ]
    if problems:
        raise PlanError(problems)
    return Plan(tp_attn=parallel.tp, tp_expert=parallel.tp)
