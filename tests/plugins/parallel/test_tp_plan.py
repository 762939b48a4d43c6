"""The plan `tp`: what it makes of the settings, and which it refuses."""

import pytest

from core.config import ParallelConfig
from core.errors import PlanError
from core.hookspecs import NoOptions
from plugins.parallel import register_parallel_plan
from plugins.parallel.tp import make_plan


@pytest.mark.parametrize("tp", [1, 3, 16])
def test_all_ranks_form_one_tensor_parallel_group(tp: int) -> None:
    plan = make_plan(NoOptions(), ParallelConfig(tp=tp))
    assert plan.world_size == tp
    assert plan.groups("tp") == [list(range(tp))] == plan.groups("tp_expert")
    assert plan.axis_size("ep") == plan.axis_size("dp") == 1


def test_every_contradiction_is_named_with_its_key_and_the_remedy() -> None:
    config = ParallelConfig(tp=4, ep=4, dp_attention=2, dp_lm_head=True, redundant_experts=8)
    with pytest.raises(PlanError) as caught:
        make_plan(NoOptions(), config)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "parallel.ep=4",
        "parallel.dp_attention=2",
        "parallel.dp_lm_head=True",
        "parallel.redundant_experts=8",
    ]
    assert "set parallel.ep=1, or another parallel.plan" in caught.value.problems[0]


def test_it_is_registered_under_its_name() -> None:
    (registration,) = register_parallel_plan()
    assert (registration.name, registration.factory) == ("tp", "plugins.parallel.tp:make_plan")
