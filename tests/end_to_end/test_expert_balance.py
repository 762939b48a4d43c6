"""Experts that move while the model serves: no token changes, and their load becomes even.

Ranks are threads over the code that processes run.
"""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from core.interfaces.destinations import Destinations
from core.layers.experts.experts import LocalExperts
from core.ops.expert_map import map_experts
from core.parallel.eplb import imbalance
from core.parallel.experts import LayerPlacement
from core.settings.config import AppConfig, ExpertBalanceConfig, PluginChoice
from tests.support.engine import app_config, folder_model, greedy, spread_engine
from tests.support.oracle import TransformersOracle

Folder = Callable[[str], Path]
MAX_TOKENS = 16


def prompts() -> list[list[int]]:
    """Few different tokens, so that few experts have most of the rows."""
    chooser = random.Random(3)
    return [[chooser.choice((7, 8, 9)) for _ in range(n)] for n in (2, 5, 9, 14, 23, 40)]


class Moves:
    """Where experts were, by layer: every rank reports each placement it moves to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_layer: dict[int, list[LayerPlacement]] = {}
        self.num_calls: Counter[int] = Counter()
        self._lock = threading.Lock()
        move = LocalExperts.move

        def noted(layer: LocalExperts, placement: LayerPlacement) -> None:
            with self._lock:
                self.num_calls[layer.layer] += 1
                seen = self.by_layer.setdefault(layer.layer, [layer.placement])
                if seen[-1] != placement:
                    assert seen[-1] == layer.placement, "ranks moved to different places"
                    seen.append(placement)
            move(layer, placement)

        monkeypatch.setattr(LocalExperts, "move", noted)


def config_of(
    folder: Path, plan: tuple[int, int, int], a2a: str, eplb: ExpertBalanceConfig, redundant: int
) -> AppConfig:
    tp, ep, dp = plan
    return app_config(
        folder_model(folder, max_model_len=256),
        parallel={
            "plan": "dp_attention",
            "tp": tp,
            "ep": ep,
            "dp_attention": dp,
            "redundant_experts": redundant,
            "eplb": eplb,
        },
        moe_a2a={"prefill": PluginChoice(name=a2a), "decode": PluginChoice(name=a2a)},
        engine={
            "page_size": 4,
            "chunked_prefill_size": 16,
            "max_running_requests": 8,
            "kv_cache_tokens": 1024,
        },
    )


@pytest.mark.parametrize(
    ("name", "plan", "a2a", "redundant"),
    [
        ("deepseek_v3", (4, 4, 2), "nccl", 4),
        ("deepseek_v3", (4, 2, 4), "allgather", 0),
        ("qwen3_moe", (4, 4, 4), "nccl", 8),
    ],
    ids=str,
)
def test_moving_experts_changes_no_token(
    name: str,
    plan: tuple[int, int, int],
    a2a: str,
    redundant: int,
    tiny_folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves = Moves(monkeypatch)
    oracle = TransformersOracle(tiny_folder(name))
    expected = [oracle.greedy(prompt, MAX_TOKENS) for prompt in prompts()]
    eplb = ExpertBalanceConfig(interval_steps=5)
    with spread_engine(config_of(tiny_folder(name), plan, a2a, eplb, redundant)) as engine:
        for _ in range(3):
            answers = engine.generate(prompts(), greedy(MAX_TOKENS))
            assert [answer.token_ids for answer in answers] == expected
    assert moves.by_layer, "no expert moved: the test shows nothing"
    for layer, placements in moves.by_layer.items():
        assert moves.num_calls[layer] == plan[0] * (len(placements) - 1)


def test_loads_of_one_run_place_the_experts_of_the_next(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes where experts are, not what is answered."""
    folder, plan = tiny_folder("deepseek_v3"), (4, 4, 2)
    counted: dict[int, Counter[int]] = {}
    lock = threading.Lock()
    placements: dict[int, LayerPlacement] = {}
    layers: dict[int, int] = {}  # by where a layer counts
    destinations = LocalExperts.destinations

    def noting(layer: LocalExperts, num_real: Tensor, first_row: int) -> Destinations:
        to = destinations(layer, num_real, first_row)
        layers[id(to.counts_X)] = layer.layer
        placements[layer.layer] = layer.placement
        return to

    def counting(logical_TK: Tensor, weights_TK: Tensor, to: Destinations) -> Tensor:
        with lock:
            rows = counted.setdefault(layers[id(to.counts_X)], Counter())
            real = max(int(to.num_real) - to.first_row, 0)
            rows.update(logical_TK[:real].flatten().tolist())
        return map_experts(logical_TK, weights_TK, to)

    monkeypatch.setattr(LocalExperts, "destinations", noting)
    monkeypatch.setattr("core.ops.torch_moe.map_experts", counting)
    with spread_engine(config_of(folder, plan, "nccl", ExpertBalanceConfig(), 4)) as engine:
        first = engine.generate(prompts(), greedy(MAX_TOKENS))
    before = dict(placements)
    loads = {
        layer: [rows[expert] for expert in range(before[layer].num_logical)]
        for layer, rows in counted.items()
    }
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"layers": loads}))
    eplb = ExpertBalanceConfig(load_file=str(path))
    with spread_engine(config_of(folder, plan, "nccl", eplb, 4)) as engine:
        second = engine.generate(prompts(), greedy(MAX_TOKENS))
    assert [a.token_ids for a in second] == [a.token_ids for a in first]
    for layer, rows in loads.items():
        assert imbalance(placements[layer], rows) <= imbalance(before[layer], rows)
    assert placements != before
