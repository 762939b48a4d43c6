"""The example's parallelism plan: what it makes of its settings, and which it refuses."""

import sys
from pathlib import Path

import pytest

from core.errors import ConfigError, PlanError
from core.plugin.plugin_manager import PluginManager
from core.settings.config import ParallelConfig, PluginChoice

EXAMPLE = Path(__file__).parents[2] / "examples/acme_plan"


@pytest.fixture
def plugins(monkeypatch):
    """The built-in plans and the example."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "acme_plan", raising=False)
    import acme_plan

    return PluginManager.load(builtins=["plugins.parallel"], objects={"acme": acme_plan})


def plan(plugins, options=None, **settings):
    parallel = ParallelConfig(plan="acme", options=options or {}, **settings)
    choice = PluginChoice(name="acme", options=parallel.options)
    return plugins.table("parallel_plan").create(choice, parallel)


def test_more_ranks_are_more_attention_groups_of_one_size(plugins):
    small, large = plan(plugins, tp=4), plan(plugins, tp=8)
    assert small.groups("tp") == [[0, 1], [2, 3]]
    assert large.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert large.groups("ep") == [list(range(8))]
    assert plan(plugins, {"attention_ranks": 4}, tp=8).dp == 2


def test_its_problems_are_reported_with_their_keys(plugins):
    with pytest.raises(PlanError) as caught:
        plan(plugins, {"attention_ranks": 3}, tp=4, ep=2)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "parallel.options.attention_ranks",
        "parallel.ep",
    ]
    with pytest.raises(ConfigError, match=r"parallel\.options: attention_ranks=0 is out of range"):
        plan(plugins, {"attention_ranks": 0}, tp=4)
    with pytest.raises(ConfigError, match=r"parallel\.options\.attention_rank'"):
        plan(plugins, {"attention_rank": 2}, tp=4)
