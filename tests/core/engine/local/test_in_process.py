"""One rank alone: the whole engine of a small plan, or one rank of a larger one without peers."""

import logging
from pathlib import Path

import pytest
import torch

from core.engine.build.rank import build_rank
from core.engine.local.in_process import build_in_process, offline_in_process
from core.errors import ConfigError
from core.parallel.plan import AXES
from core.plugin.plugin_manager import PluginManager
from core.settings.config import PluginChoice
from tests.support.engine import app_config, folder_model, greedy, offline_engine
from tests.support.models import write_tiny_model

EMULATED = PluginChoice(name="emulated")
ENGINE = {"kv_cache_tokens": 1024, "page_size": 4, "max_running_requests": 8}
PROMPTS = [[5, 6, 7], [9] * 11, [3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "deepseek_v3", "deepseek_v3")


def config(folder: Path, comm: PluginChoice, layout: str = "contiguous", **parallel: object):
    a2a = PluginChoice(name="emulated", options={"layout": layout})
    sections = {"moe_a2a": {"prefill": a2a, "decode": a2a}} if comm is EMULATED else {}
    return app_config(
        folder_model(folder, max_model_len=128),
        engine=ENGINE,
        comm={"tp": comm, "ep": comm},
        parallel=parallel,
        **sections,
    )


def test_alone_it_answers_as_any_engine(folder: Path) -> None:
    one = config(folder, PluginChoice())
    with offline_engine(one) as engine:
        expected = [answer.token_ids for answer in engine.generate(PROMPTS, greedy(6))]
    lone = offline_in_process(build_in_process(one))
    assert [answer.token_ids for answer in lone.generate(PROMPTS, greedy(6))] == expected


@pytest.mark.parametrize("layout", ["contiguous", "batched"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"plan": "dp_attention", "tp": 4, "ep": 4, "dp_attention": 4},
        {"plan": "dp_attention", "tp": 4, "ep": 4, "dp_attention": 4, "dp_lm_head": True},
        {"plan": "dp_attention", "tp": 4, "ep": 2, "dp_attention": 2},
        {"plan": "tp", "tp": 4},
    ],
    ids=str,
)
def test_one_rank_of_a_plan_runs_without_peers(
    folder: Path, parallel: dict[str, object], layout: str
) -> None:
    built = config(folder, EMULATED, layout, **parallel)
    if parallel["plan"] == "tp":
        local = PluginChoice(name="local")
        built.moe_a2a.prefill = built.moe_a2a.decode = local
    lone = build_in_process(built, rank=1)
    assert lone.resolved.plan.world_size == 4
    answers = offline_in_process(lone).generate(PROMPTS, greedy(6))
    assert [len(answer.token_ids) for answer in answers] == [6, 6, 6]
    assert all(answer.error is None for answer in answers)


def test_a_rank_holds_its_own_share_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "core.engine.local.in_process.build_rank",
        lambda config, context: seen.append(context) or build_rank(config, context),
    )
    whole = build_in_process(config(folder, PluginChoice())).engine.weight_bytes
    built = config(folder, EMULATED, plan="dp_attention", tp=4, ep=4, dp_attention=4)
    assert build_in_process(built, rank=3).engine.weight_bytes < whole
    axes = seen[-1].comms.axes
    assert {axis: (axes[axis].rank, axes[axis].size) for axis in AXES if axes[axis].size > 1} == {
        "dp": (3, 4),
        "ep": (3, 4),
        "world": (3, 4),
    }
    assert torch.device("cpu") == seen[-1].device


def test_plugins_that_need_peers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"comm\.tp=gloo needs all 4 ranks .*comm=emulated"):
        build_in_process(config(folder, PluginChoice(name="gloo"), tp=4))


@pytest.mark.parametrize("key", ["comm.tp", "comm.ep", "moe_a2a.prefill", "moe_a2a.decode"])
def test_none_of_it_serves(folder: Path, key: str) -> None:
    plugins = PluginManager.load([])
    served = app_config(folder_model(folder))
    plugins.require_serving(served)
    section, name = key.split(".")
    setattr(getattr(served, section), name, EMULATED)
    with pytest.raises(ConfigError, match=rf"{key}=emulated .*set {key}=auto"):
        plugins.require_serving(served)


@pytest.mark.parametrize(("routing", "times"), [("learned", 0), ("uniform_random", 1)])
def test_random_routing_is_warned_of_once(
    folder: Path, caplog: pytest.LogCaptureFixture, routing: str, times: int
) -> None:
    model = folder_model(folder, max_model_len=128, expert_routing=routing)
    with caplog.at_level(logging.WARNING):
        build_in_process(app_config(model, engine=ENGINE))
    warnings = [record for record in caplog.records if "expert_routing" in record.getMessage()]
    assert len(warnings) == times
    assert all("answers mean nothing" in record.getMessage() for record in warnings)
