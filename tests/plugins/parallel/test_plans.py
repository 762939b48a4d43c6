"""The built-in plans: what they make of the settings, which they refuse, and every ready config."""

import re
from pathlib import Path

import pytest
import yaml

from core.errors import PlanError
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.plugin.plugin_manager import PluginManager
from core.settings.config import (
    AppConfig,
    ExpertBalanceConfig,
    ModelConfig,
    ParallelConfig,
    PluginChoice,
)
from plugins.parallel import check_plan, dp_attention, register_parallel_plan, tp, tp_ep

CONFIGS = sorted((Path(__file__).parents[3] / "conf/parallel").glob("*.yaml"))


def make(plan: str, **settings: object) -> Plan:
    factory = {"tp": tp, "tp_ep": tp_ep, "dp_attention": dp_attention}[plan].make_plan
    return factory(NoOptions(), ParallelConfig(plan=plan, **settings))


def refused(plan: str, **settings: object) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make(plan, **settings)
    return caught.value.problems


def problems_of(**settings: object) -> list[str]:
    parallel = ParallelConfig(**settings)
    return list(check_plan(AppConfig(model=ModelConfig(name="m"), parallel=parallel)))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_tp_is_one_group_of_all_ranks(size: int) -> None:
    plan = make("tp", tp=size)
    assert plan.groups("tp") == [list(range(size))] == plan.groups("tp_expert")
    assert plan.axis_size("ep") == plan.axis_size("dp") == 1


def test_tp_ep_spreads_whole_experts_and_cuts_attention() -> None:
    plan = make("tp_ep", tp=4, ep=4)
    assert plan.groups("tp") == [[0, 1, 2, 3]] == plan.groups("ep")
    assert plan.axis_size("tp_expert") == 1


def test_tp_ep_cuts_experts_over_what_ep_leaves() -> None:
    plan = make("tp_ep", tp=8, ep=2, dense_tp=4, redundant_experts=6)
    assert plan.groups("tp_expert") == [[0, 1, 2, 3], [4, 5, 6, 7]] == plan.groups("dense")
    assert plan.groups("ep") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert plan.redundant_experts == 6


def test_dp_attention_gives_each_group_a_share_of_the_ranks() -> None:
    plan = make("dp_attention", tp=8, ep=8, dp_attention=4)
    assert plan.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]] == plan.groups("dense")
    assert plan.groups("dp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan.groups("ep") == [list(range(8))]
    assert not plan.dp_lm_head


def test_dp_attention_takes_a_cut_of_its_own_for_dense_layers_and_experts() -> None:
    plan = make("dp_attention", tp=4, ep=2, dp_attention=4, dense_tp=2, dp_lm_head=True)
    assert plan.groups("dense") == [[0, 1], [2, 3]] == plan.groups("tp_expert")
    assert plan.groups("tp") == [[0], [1], [2], [3]]
    assert plan.dp_lm_head
    experts_everywhere = make("dp_attention", tp=4, dp_attention=2)
    assert experts_everywhere.groups("tp_expert") == [[0, 1, 2, 3]]


def test_tp_names_every_setting_it_has_no_use_for() -> None:
    problems = refused("tp", tp=4, ep=4, dp_attention=2, dense_tp=2)
    assert problems == (
        "parallel.ep=4: the plan 'tp' has no expert parallelism; set parallel.ep=1, or another "
        "parallel.plan",
        "parallel.dp_attention=2: the plan 'tp' has no data-parallel attention; set "
        "parallel.dp_attention=1, or another parallel.plan",
        "parallel.dense_tp=2: the plan 'tp' has no other cut of dense layers; set "
        "parallel.dense_tp=null, or another parallel.plan",
    )


def test_sizes_that_do_not_divide_are_named_with_those_that_do() -> None:
    assert refused("tp_ep", tp=6, ep=4, dense_tp=5) == (
        "parallel.ep=4 does not divide parallel.tp=6, the ranks of a replica; allowed: 1, 2, 3, 6",
        "parallel.dense_tp=5 does not divide parallel.tp=6, the ranks of a replica; "
        "allowed: 1, 2, 3, 6",
    )
    problems = refused("dp_attention", tp=4, ep=8, dp_attention=3, dense_tp=3)
    assert [problem.partition(" does not divide parallel.tp=4")[0] for problem in problems] == [
        "parallel.dp_attention=3",
        "parallel.ep=8",
        "parallel.dense_tp=3",
    ]


def test_tp_ep_has_no_data_parallel_attention() -> None:
    (problem,) = refused("tp_ep", tp=4, ep=4, dp_attention=2)
    assert problem.startswith("parallel.dp_attention=2: the plan 'tp_ep' has no data-parallel")


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"redundant_experts": 8}, "parallel.redundant_experts=8 needs experts on different"),
        ({"eplb": {"interval_steps": 5}}, "parallel.eplb.interval_steps=5 needs experts on diff"),
        ({"eplb": {"load_file": "/l"}}, "parallel.eplb.load_file=/l needs experts on different"),
        ({"dp_lm_head": True}, "parallel.dp_lm_head=true needs ranks with rows of their own"),
    ],
)
def test_settings_that_need_another_are_named(settings: dict, fragment: str) -> None:
    if "eplb" in settings:
        settings = {"eplb": ExpertBalanceConfig(**settings["eplb"])}
    (problem,) = problems_of(**settings)
    assert problem.startswith(fragment)
    assert problems_of(tp=4, ep=2, dp_attention=2, **settings) == []


def test_all_problems_are_found_together() -> None:
    eplb = ExpertBalanceConfig(interval_steps=1, load_file="x")
    assert len(problems_of(redundant_experts=1, dp_lm_head=True, eplb=eplb)) == 4
    assert problems_of() == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_ready_config_is_the_plan_its_name_says(path: Path) -> None:
    name = re.fullmatch(r"tp(\d+)(?:_ep(\d+))?(?:_dp(\d+))?", path.stem)
    assert name is not None
    tp_size, ep, dp = (int(size or 1) for size in name.groups())
    settings = yaml.safe_load(path.read_text())
    plan = make(**settings)
    assert (plan.world_size, plan.ep, plan.dp) == (tp_size, ep, dp)
    assert plan.tp_attn * dp == tp_size
    assert plan.tp_expert * ep == tp_size


def test_the_registrations_lead_to_the_plans() -> None:
    table = PluginManager.load(builtins=["plugins.parallel"]).table("parallel_plan")
    for registration in register_parallel_plan():
        plan = table.create(PluginChoice(name=registration.name), ParallelConfig(tp=2))
        assert plan.world_size == 2
        assert registration.summary
