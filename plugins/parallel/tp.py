"""Plain tensor parallelism: one replica, every layer split over all of its ranks.

Whether a model's sizes divide is the model family's to say (`ModelFamily.plan_problems`).
"""

from core.errors import PlanError
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.settings.config import ParallelConfig
from plugins.parallel._settings import absent_problems


def make_plan(options: NoOptions, parallel: ParallelConfig) -> Plan:
    """The plan of `parallel=tpN`. Raises PlanError naming every setting that contradicts it."""
    problems = absent_problems(
        "tp",
        {
            "parallel.ep": (parallel.ep, 1, "expert parallelism"),
            "parallel.dp_attention": (parallel.dp_attention, 1, "data-parallel attention"),
            "parallel.dense_tp": (parallel.dense_tp, None, "other cut of dense layers"),
        },
    )
    if problems:
        raise PlanError(problems)
    return Plan(tp_attn=parallel.tp, tp_expert=parallel.tp)
