"""Balancing experts while ranks run: all decide alike, and weights go where placements say."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.engine.run.expert_balance import (
    GATHER_STEPS,
    READ_DELAY_STEPS,
    EplbBalancer,
    NoExpertBalancer,
    initial_placements,
    make_expert_balancer,
)
from core.errors import ConfigError, PlanError
from core.interfaces.comm import Comms
from core.interfaces.model import ModelSpec, MoESpec
from core.parallel.eplb import imbalance
from core.parallel.experts import LayerPlacement, default_placement
from core.parallel.plan import Plan
from core.settings.config import ExpertBalanceConfig
from core.testing.ranks import plan_comms, run_ranks

NUM_EXPERTS, REDUNDANT, EP = 16, 8, 4
PLAN = Plan(tp_attn=EP, ep=EP, redundant_experts=REDUNDANT)
LAYERS = (1, 2, 5)


def spec_of(**moe: int) -> ModelSpec:
    return ModelSpec(
        architecture="Fake",
        num_layers=6,
        hidden_size=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=2,
        intermediate_size=8,
        vocab_size=8,
        max_position_embeddings=8,
        dtype="float32",
        moe=MoESpec(
            **{"num_experts": NUM_EXPERTS, "top_k": 2, "intermediate_size": 8, "layers": LAYERS}
            | moe  # type: ignore[arg-type]
        ),
    )


class FakeLayer:
    """An expert layer whose weights are the experts' own numbers."""

    def __init__(self, comms: Comms, layer: int) -> None:
        self.layer = layer
        self.placement = default_placement(NUM_EXPERTS, EP, REDUNDANT)
        self.moved_at: list[int] = []
        self.step = 0
        self._comm = comms.axes["ep"]
        self.weights = torch.tensor(self.placement.local(self._comm.rank))
        self._counts = torch.zeros(NUM_EXPERTS, dtype=torch.int64)

    def route(self, logical: Tensor) -> None:
        """A step of this rank: rows go to these experts."""
        self.step += 1
        self._counts += torch.bincount(logical, minlength=NUM_EXPERTS)

    def take_counts(self) -> Tensor:
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        return counts

    def move(self, placement: LayerPlacement) -> None:
        """Every rank asks all others for what it is going to hold."""
        everyone = self._comm.all_gather(self.weights, 0)
        wanted = placement.local(self._comm.rank)
        self.weights = torch.stack([everyone[(everyone == e).nonzero()[0, 0]] for e in wanted])
        self.placement = placement
        self.moved_at.append(self.step)


def popularity(layer: int) -> list[float]:
    """Experts of a layer by how often they are chosen, skewed."""
    weights = [1 / (rank + 1) for rank in range(NUM_EXPERTS)]
    random.Random(layer).shuffle(weights)
    return weights


def run(
    num_steps: int,
    config: ExpertBalanceConfig,
    then: Callable[[EplbBalancer, list[FakeLayer]], None] = lambda expert_balancer, layers: None,
) -> list[tuple[EplbBalancer, list[FakeLayer]]]:
    """Expert balancer and layers of every rank after some steps; `then` is called after each."""

    def of_rank(comms: Comms) -> tuple[EplbBalancer, list[FakeLayer]]:
        world = comms.axes["world"]
        layers = [FakeLayer(comms, layer) for layer in LAYERS]
        expert_balancer = make_expert_balancer(
            layers, world, config, spec_of(), PLAN, num_nodes=1, rows_are_cut=True
        )
        assert isinstance(expert_balancer, EplbBalancer)
        generator = random.Random(world.rank)  # every rank has rows of its own
        for _ in range(num_steps):
            for layer in layers:
                chosen = generator.choices(range(NUM_EXPERTS), popularity(layer.layer), k=20)
                layer.route(torch.tensor(chosen))
            expert_balancer.after_step()
            then(expert_balancer, layers)
        return expert_balancer, layers

    return run_ranks(plan_comms(PLAN), of_rank)


def test_experts_move_to_where_ranks_are_even() -> None:
    loads = {}

    def remember(expert_balancer: EplbBalancer, layers: list[FakeLayer]) -> None:
        found = expert_balancer.take_loads()
        if found is not None:
            loads[layers[0].step] = found

    config = ExpertBalanceConfig(interval_steps=50)
    ranks = run(120, config, remember)
    for index, layer in enumerate(LAYERS):
        of_ranks = [layers[index] for _, layers in ranks]
        assert len({fake.placement for fake in of_ranks}) == 1, "ranks disagree"
        placement = of_ranks[0].placement
        for rank, fake in enumerate(of_ranks):
            assert fake.weights.tolist() == list(placement.local(rank))
        expected = [int(weight * 1000) for weight in popularity(layer)]
        before = default_placement(NUM_EXPERTS, EP, REDUNDANT)
        assert imbalance(placement, expected) < 1.15
        assert imbalance(placement, expected) < imbalance(before, expected)
    assert max(loads[54].imbalance) > 1.3  # as it was
    assert max(loads[GATHER_STEPS + READ_DELAY_STEPS].imbalance) < 1.2


def test_layers_move_one_after_the_other_between_agreed_steps() -> None:
    for layers_per_step, steps in ((1, (34, 35, 36)), (2, (34, 34, 35)), (9, (34, 34, 34))):
        config = ExpertBalanceConfig(interval_steps=30, layers_per_step=layers_per_step)
        for _, layers in run(40, config):
            assert tuple(fake.moved_at[0] for fake in layers) == steps
    assert READ_DELAY_STEPS == 4


def test_off_by_default_but_rows_are_counted() -> None:
    seen = []

    def remember(expert_balancer: EplbBalancer, layers: list[FakeLayer]) -> None:
        found = expert_balancer.take_loads()
        if found is not None and layers[0]._comm.rank == 0:
            seen.append((layers[0].step, found))

    for _, layers in run(2 * GATHER_STEPS + READ_DELAY_STEPS, ExpertBalanceConfig(), remember):
        assert all(not fake.moved_at for fake in layers)
    assert [step for step, _ in seen] == [104, 204]
    for step, loads in seen:
        assert loads.layers == list(LAYERS)
        rows_of_a_layer = (step - READ_DELAY_STEPS) * 20 * EP  # of all ranks, none lost
        assert [sum(rows) for rows in loads.rows] == [rows_of_a_layer] * 3
        assert all(len(rows) == NUM_EXPERTS for rows in loads.rows)


def test_every_step_may_be_an_interval() -> None:
    """Sums are on their way while the next begins, and moving is not done when the next is due."""
    for interval in (1, 2, 3):
        ranks = run(40, ExpertBalanceConfig(interval_steps=interval))
        for index in range(len(LAYERS)):
            placements = {layers[index].placement for _, layers in ranks}
            assert len(placements) == 1
            for rank, (_, layers) in enumerate(ranks):
                assert layers[index].weights.tolist() == list(layers[index].placement.local(rank))


def test_even_experts_stay() -> None:
    def of_rank(comms: Comms) -> list[int]:
        layer = FakeLayer(comms, 1)
        layer.placement = LayerPlacement(NUM_EXPERTS, EP, tuple(range(NUM_EXPERTS)))
        config = ExpertBalanceConfig(interval_steps=5)
        expert_balancer = EplbBalancer([layer], comms.axes["world"], config)
        for _ in range(30):
            layer.route(torch.arange(NUM_EXPERTS))
            expert_balancer.after_step()
        return layer.moved_at

    assert run_ranks(plan_comms(PLAN), of_rank) == [[]] * EP


def test_replicated_rows_are_counted_once() -> None:
    """Plain tensor parallelism: every rank routes the same rows."""
    plan = Plan(tp_attn=2, tp_expert=2)

    def of_rank(comms: Comms) -> list[list[int]]:
        layer = FakeLayer(comms, 1)
        layer.placement = default_placement(NUM_EXPERTS, 1, 0)
        expert_balancer = make_expert_balancer(
            [layer],
            comms.axes["world"],
            ExpertBalanceConfig(),
            spec_of(),
            plan,
            num_nodes=1,
            rows_are_cut=False,
        )
        for _ in range(GATHER_STEPS + READ_DELAY_STEPS):
            layer.route(torch.arange(3))
            expert_balancer.after_step()
        loads = expert_balancer.take_loads()
        assert loads is not None
        return loads.rows

    comms = plan_comms(plan)
    for of_one in comms:
        assert of_one.axes["ep"].size == 1
    assert run_ranks(comms, of_rank) == [[[100] * 3 + [0] * (NUM_EXPERTS - 3)]] * 2


def test_what_was_counted_before_does_not_count() -> None:
    def of_rank(comms: Comms) -> None:
        layer = FakeLayer(comms, 1)
        layer.route(torch.zeros(1000, dtype=torch.int64))  # warming up
        EplbBalancer([layer], comms.axes["world"], ExpertBalanceConfig())
        assert layer.take_counts().sum() == 0

    run_ranks(plan_comms(PLAN), of_rank)


def test_models_without_experts_have_nothing_to_balance() -> None:
    comms = plan_comms(Plan())[0]
    spec = replace(spec_of(), moe=None)
    expert_balancer = make_expert_balancer(
        [],
        comms.axes["world"],
        ExpertBalanceConfig(interval_steps=1),
        spec,
        Plan(),
        num_nodes=1,
        rows_are_cut=False,
    )
    assert isinstance(expert_balancer, NoExpertBalancer)
    expert_balancer.after_step()
    assert expert_balancer.take_loads() is None
    assert initial_placements(spec, Plan(), ExpertBalanceConfig()) == {}


def test_a_file_of_loads_places_at_start(tmp_path: Path) -> None:
    loads = [int(weight * 1000) for weight in popularity(2)]
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"layers": {"2": loads}}))
    config = ExpertBalanceConfig(load_file=str(path))
    placements = initial_placements(spec_of(), PLAN, config)
    default = default_placement(NUM_EXPERTS, EP, REDUNDANT)
    assert set(placements) == set(LAYERS)
    assert placements[1] == placements[5] == default
    assert imbalance(placements[2], loads) < 1.05 < imbalance(default, loads)
    assert initial_placements(spec_of(), PLAN, ExpertBalanceConfig()) == dict.fromkeys(
        LAYERS, default
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read: No such file"),
        ("no json", "no file of expert loads"),
        ('{"layers": {"x": [1]}}', "no file of expert loads"),
        ('{"layers": {"3": [1]}}', "layer 3, which has no experts .*: 1 to 5"),
        ('{"layers": {"2": [1, 2]}}', "has 2 loads for layer 2; needed: 16"),
        (json.dumps({"layers": {"2": [-1] * 16}}), "none below 0"),
    ],
)
def test_files_that_are_no_loads_are_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "loads.json"
    if content is not None:
        path.write_text(content)
    config = ExpertBalanceConfig(load_file=str(path))
    with pytest.raises(ConfigError, match=rf"parallel\.eplb\.load_file='{path}' .*{words}"):
        initial_placements(spec_of(), PLAN, config)


def test_groups_stay_on_nodes_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"layers": {str(i): list(range(16)) for i in LAYERS}}))
    config = ExpertBalanceConfig(strategy="hierarchical", load_file=str(path))
    spec = spec_of(num_groups=4)
    for placement in initial_placements(spec, PLAN, config, num_nodes=2).values():
        for first in (0, 2):
            held = {*placement.local(first), *placement.local(first + 1)}
            assert len({expert // 4 for expert in held}) == 2
    with pytest.raises(PlanError, match="hierarchical"):
        initial_placements(spec, PLAN, config, num_nodes=3)
