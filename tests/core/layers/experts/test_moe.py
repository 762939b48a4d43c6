"""Mixture-of-experts blocks against transformers' modules in float32: alone, over ranks in threads
with each way to carry rows, and while experts move. Shape legend: T rows, E hidden size."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.devices.cpu.cpu_ops import CpuOps
from core.devices.select import select_ops
from core.devices.weight_formats import BlockFp8Format
from core.interfaces.comm import SOLO, Comms, places
from core.interfaces.model import BuildContext, ExpertContext
from core.interfaces.moe_a2a import Dispatched, ExpertLayout
from core.interfaces.ops import Ops
from core.interfaces.weights import PlainFormat
from core.layers.experts.expert_moves import expert_moves
from core.layers.experts.moe import MoELayer, rows_by_ep
from core.layers.experts.moe_spec import MoELayerSpec
from core.layers.experts.router import ExpertMap
from core.ops.block_fp8 import dequantize, quantize
from core.ops.expert_map import map_experts
from core.ops.torch_ops import TorchOps
from core.parallel.experts import LayerPlacement, default_placement
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows, solo_rows
from core.testing.ranks import plan_comms, run_ranks
from core.weights.reader import ShapeReader
from tests.core.layers.experts.moe_cases import (
    CPU,
    FAMILIES,
    HIDDEN,
    LAYER,
    NUM_EXPERTS,
    SIZE,
    TOP_K,
    Setup,
    StateReader,
    checkpoint,
    random_block,
    step_of,
)

GPU = torch.device("cuda")
ALONE = Setup(Plan(), default_placement(NUM_EXPERTS, 1, 0))
PLANS = {
    "tp2": (Plan(tp_attn=2, tp_expert=2), ["local"]),
    "tp2_ep2": (Plan(tp_attn=2, ep=2), ["allgather", "contiguous", "batched", "nccl"]),
    "tp2_ep2_stay": (Plan(tp_attn=2, ep=2, replicated_rows=True), ["local"]),
    "tp4_ep2_stay": (Plan(tp_attn=4, ep=2, tp_expert=2, replicated_rows=True), ["local"]),
    "dp2_tp_expert2": (Plan(dp=2, tp_expert=2), ["local"]),
    "dp2_ep2": (Plan(dp=2, ep=2), ["nccl"]),
    "tp4_ep2": (Plan(tp_attn=4, ep=2, tp_expert=2), ["allgather"]),
    "dp2_tp2_ep2": (Plan(dp=2, tp_attn=2, ep=2, tp_expert=2), ["allgather", "nccl"]),
    "dp4_ep4": (Plan(dp=4, ep=4), ["allgather", "nccl"]),
}


def rows_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(num_rows))


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("ops", [TorchOps, CpuOps])
@torch.no_grad()
def test_one_rank_agrees_with_transformers(family: str, ops: Callable[[], Ops]) -> None:
    spec, block = FAMILIES[family].spec, random_block(FAMILIES[family])
    layer = replace(ALONE, ops=ops).layer(spec, checkpoint(block, spec), SOLO)
    for num_rows in (1, 19):
        x_TE = rows_of(num_rows)
        close(layer(x_TE, step_of(solo_rows(num_rows))), block(x_TE[None])[0])
    assert layer(rows_of(0), step_of(solo_rows(0))).shape == (0, HIDDEN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_gpu_agrees_and_is_not_waited_for(family: str) -> None:
    spec, block = FAMILIES[family].spec, random_block(FAMILIES[family])
    setup = replace(ALONE, ops=lambda: select_ops(GPU), device=GPU)
    layer = setup.layer(spec, checkpoint(block, spec), SOLO)
    for num_rows in (1, 19):
        x_TE, step = rows_of(num_rows).to(GPU), step_of(solo_rows(num_rows), device=GPU)
        layer(x_TE, step)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out_TE = layer(x_TE, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(out_TE.cpu(), block(rows_of(num_rows)[None])[0])
    assert layer(rows_of(0).to(GPU), step_of(solo_rows(0), device=GPU)).shape == (0, HIDDEN)


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize(
    ("plan", "dispatcher"),
    [
        pytest.param(plan, dispatcher, id=f"{name}-{dispatcher}")
        for name, (plan, dispatchers) in PLANS.items()
        for dispatcher in dispatchers
    ],
)
@torch.no_grad()
def test_ranks_agree_with_transformers(plan: Plan, dispatcher: str, redundant: int) -> None:
    """Also where DP ranks have different numbers of rows, few rows, or none."""
    family = FAMILIES["deepseek_v3"]
    spec, block = family.spec, random_block(family)
    weights = checkpoint(block, spec)
    setup = Setup(plan, default_placement(NUM_EXPERTS, plan.ep, redundant), dispatcher)
    steps = [(7, 3, 5, 1)[: plan.dp], (0, 6, 0, 0)[-plan.dp :], (1, 0, 0, 0)[: plan.dp]]

    def work(comms: Comms) -> None:
        layer = setup.layer(spec, weights, comms)
        for phase, by_dp in zip(("prefill", "decode", "decode"), steps, strict=True):
            x_TE = rows_of(sum(by_dp))
            expected_TE = block(x_TE[None])[0] if len(x_TE) else x_TE
            rows = setup.rows(comms, by_dp)
            out = layer(setup.part_of(x_TE, rows), step_of(rows, phase))
            close(setup.real(out, rows), setup.real(setup.part_of(expected_TE, rows), rows))

    run_ranks(plan_comms(plan), work)


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_other_families_over_ranks(family: str) -> None:
    plan = Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)
    spec, block = FAMILIES[family].spec, random_block(FAMILIES[family])
    weights, x_TE = checkpoint(block, spec), rows_of(12)
    expected_TE = block(x_TE[None])[0]
    setup = Setup(plan, default_placement(NUM_EXPERTS, plan.ep, 0), "nccl")

    def work(comms: Comms) -> None:
        rows = setup.rows(comms, (7, 5))
        out = setup.layer(spec, weights, comms)(setup.part_of(x_TE, rows), step_of(rows))
        close(setup.real(out, rows), setup.real(setup.part_of(expected_TE, rows), rows))

    run_ranks(plan_comms(plan), work)


class Recorder:
    """A dispatcher that keeps what it was given."""

    layout = ExpertLayout.CONTIGUOUS

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        self.experts_TK, self.weights_TK, self.counts = experts_TK, weights_TK, tuple(counts)
        return Dispatched(x_TE[:0], torch.zeros(NUM_EXPERTS // 2, dtype=torch.int64), None)

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        return torch.zeros(len(self.experts_TK), HIDDEN)


@torch.no_grad()
def test_what_dispatchers_are_given() -> None:
    """Padding without expert and weight, and everyone's number of rows, after the gather."""
    plan = Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)
    family = FAMILIES["qwen3_moe"]
    weights = checkpoint(random_block(family), family.spec)
    setup = Setup(plan, default_placement(NUM_EXPERTS, 2, 0), "nccl")

    def work(comms: Comms) -> Recorder:
        recorder = Recorder()
        layer = setup.layer(family.spec, weights, comms, dispatchers={"decode": recorder})
        rows = setup.rows(comms, (5, 1))
        layer(setup.part_of(rows_of(6), rows), step_of(rows, "decode"))
        return recorder

    for rank, recorder in enumerate(run_ranks(plan_comms(plan), work)):
        assert recorder.counts == (6, 2)
        # Ranks 0 and 1 share expert parts and gathered 3 + 3 rows, 2 and 3 gathered 1 + 1.
        assert len(recorder.experts_TK) == recorder.counts[rank // 2]
        is_padding = torch.tensor([False] * 5 + [True] if rank < 2 else [False, True])
        assert torch.equal((recorder.experts_TK == -1).all(1), is_padding)
        assert torch.equal((recorder.experts_TK >= 0).all(1), ~is_padding)
        assert torch.equal((recorder.weights_TK == 0).all(1), is_padding)
        sums = recorder.weights_TK[~is_padding].sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert recorder.experts_TK.dtype == torch.int64
        assert recorder.weights_TK.dtype == torch.float32


# --- balance -------------------------------------------------------------------------------------


def random_placement(seed: int, ep: int, redundant: int) -> LayerPlacement:
    chooser = random.Random(seed)
    order = [*range(NUM_EXPERTS), *chooser.choices(range(NUM_EXPERTS), k=redundant)]
    chooser.shuffle(order)
    return LayerPlacement(NUM_EXPERTS, ep, tuple(order))


@pytest.mark.parametrize("seed", range(20))
def test_moves_leave_every_place_with_its_expert(seed: int) -> None:
    ep, redundant = [(1, 2), (2, 4), (4, 4), (4, 8)][seed % 4]
    old, new = random_placement(seed, ep, redundant), random_placement(seed + 99, ep, redundant)
    moves = expert_moves(old, new)
    holds = list(old.logical_of)
    for move in moves:
        holds[move.target * new.num_local + move.slot] = old.local(move.source)[move.source_slot]
        wanted = new.local(move.target)[move.slot]
        if wanted in old.local(move.target):
            assert move.source == move.target
    assert tuple(holds) == new.logical_of
    assert len({(move.target, move.slot) for move in moves}) == len(moves)
    assert all(old.local(m.target)[m.slot] != new.local(m.target)[m.slot] for m in moves)
    assert not expert_moves(new, new)


@pytest.mark.parametrize(
    ("form", "plan"),
    [
        ("torch", Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)),
        ("torch", Plan(dp=2, tp_attn=2, ep=4)),
        ("cpu", Plan(dp=2, tp_attn=2, ep=4)),
        ("fp8", Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)),
    ],
)
@torch.no_grad()
def test_moving_experts_changes_no_result(form: str, plan: Plan) -> None:
    """From one random placement to the next."""
    family = FAMILIES["qwen3_moe"]
    spec, state = family.spec, checkpoint(random_block(family), family.spec)
    if form == "fp8":  # a rank's part of an expert is made of whole blocks
        spec = replace(spec, expert_intermediate_size=256)
        state = large_experts(spec)
    setup = Setup(
        plan,
        random_placement(0, plan.ep, 4),
        "allgather",
        CpuOps if form == "cpu" else TorchOps,
        BlockFp8Format(torch.float32) if form == "fp8" else PlainFormat(),
    )
    whole = large_reference(spec, state, fp8=form == "fp8")
    x_TE = rows_of(12)
    expected_TE = whole(x_TE)

    def work(comms: Comms) -> Tensor:
        layer = setup.layer(spec, state, comms)
        rows = setup.rows(comms, (7, 5))
        for seed in range(1, 4):
            out = layer(setup.part_of(x_TE, rows), step_of(rows))
            close(setup.real(out, rows), setup.real(setup.part_of(expected_TE, rows), rows))
            placement = random_placement(seed, plan.ep, 4)
            layer.experts.move(placement)
            assert layer.experts.placement == placement
        return layer.experts.take_counts()

    counts = torch.stack(run_ranks(plan_comms(plan), work)).sum(0)
    assert counts.sum() == 3 * 12 * TOP_K
    assert counts.dtype == torch.int64


def large_experts(spec: MoELayerSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = spec.expert_intermediate_size
    state = {"gate.weight": torch.randn(NUM_EXPERTS, HIDDEN, generator=generator)}
    for expert in range(NUM_EXPERTS):
        shapes = {"gate_proj": (size, HIDDEN), "up_proj": (size, HIDDEN)}
        for name, shape in {**shapes, "down_proj": (HIDDEN, size)}.items():
            state[f"experts.{expert}.{name}.weight"] = torch.randn(*shape, generator=generator) / 10
    return state


def large_reference(
    spec: MoELayerSpec, state: dict[str, Tensor], *, fp8: bool
) -> Callable[[Tensor], Tensor]:
    """One rank with the same weights, dequantised where ranks have them in fp8."""
    if fp8:
        state = {
            name: dequantize(quantize(value), torch.float32) if "experts." in name else value
            for name, value in state.items()
        }
    layer = ALONE.layer(spec, state, SOLO)
    return lambda x_TE: layer(x_TE, step_of(solo_rows(len(x_TE))))


def test_fp8_experts_are_kept_as_blocks() -> None:
    spec = replace(FAMILIES["qwen3_moe"].spec, expert_intermediate_size=256)
    setup = replace(ALONE, form=BlockFp8Format(torch.float32))
    layer = setup.layer(spec, large_experts(spec), SOLO)
    gate_up, down = layer.experts._kernel.read(3)
    expected = quantize(large_experts(spec)["experts.3.down_proj.weight"])
    assert not isinstance(gate_up, Tensor)
    assert not isinstance(down, Tensor)
    assert gate_up.values_OI.shape == (512, HIDDEN)
    assert torch.equal(down.values_OI.float(), expected.values_OI.float())
    assert torch.equal(down.scales, expected.scales)


def context_of(comms: Comms, stream: Layout, placement: LayerPlacement) -> BuildContext:
    return BuildContext(
        weights=StateReader({}),
        comms=comms,
        ops=TorchOps(),
        dtype=torch.float32,
        device=CPU,
        format=PlainFormat(),
        stream=stream,
        experts=ExpertContext(placements={LAYER: placement}, dispatchers={}),
    )


def mapped(experts: ExpertMap, logical_TK: torch.Tensor, num_real: int) -> torch.Tensor:
    """Physical ids; padding must have lost its weight, and only padding."""
    weights_TK = torch.ones(logical_TK.shape)
    to = experts(torch.tensor([num_real], dtype=torch.int32), first_row=0)
    physical_TK = map_experts(logical_TK, weights_TK, to)
    assert (weights_TK == (physical_TK >= 0)).all()
    return physical_TK


def test_copies_are_taken_in_turn() -> None:
    placement = LayerPlacement(3, 2, (0, 1, 0, 2, 0, 1))
    plan = Plan(dp=2, ep=2)
    logical_TK = torch.tensor([[0, 1]] * 6 + [[2, 0]] * 6)
    taken = []
    for rank in range(2):
        context = context_of(places(plan, rank), Layout.ROWS, placement)
        physical_TK = mapped(ExpertMap(context, placement), logical_TK, 12)
        owners = torch.tensor(placement.logical_of)[physical_TK]
        assert torch.equal(owners, logical_TK)
        taken.append(physical_TK)
    # Expert 0 has the copies 0, 2 and 4: every third row each; ranks start at different ones.
    assert taken[0][:6, 0].tolist() == [0, 2, 4, 0, 2, 4]
    assert taken[1][:6, 0].tolist() == [2, 4, 0, 2, 4, 0]
    replicated = [
        ExpertMap(
            context_of(places(Plan(tp_attn=2, tp_expert=2), rank), Layout.REPLICATED, whole), whole
        )
        for rank in range(2)
        for whole in [LayerPlacement(3, 1, placement.logical_of)]
    ]
    first, second = (mapped(of_rank, logical_TK, 12) for of_rank in replicated)
    assert torch.equal(first, second)  # they compute parts of the same sums


def test_padding_goes_nowhere_and_counts_start_anew() -> None:
    placement = default_placement(4, 1, 0)
    experts = ExpertMap(context_of(SOLO, Layout.REPLICATED, placement), placement)
    logical_TK = torch.tensor([[0, 1], [0, 3], [2, 3]])
    assert mapped(experts, logical_TK, 2).tolist() == [[0, 1], [0, 3], [-1, -1]]
    assert mapped(experts, logical_TK, 3).tolist() == logical_TK.tolist()
    assert mapped(experts, logical_TK[:0], 0).shape == (0, 2)
    assert experts.take_counts().tolist() == [4, 2, 1, 3]
    assert experts.take_counts().tolist() == [0, 0, 0, 0]


def test_rows_that_enter_the_experts_by_rank() -> None:
    plan = Plan(dp=2, tp_attn=4, ep=4, tp_expert=2)
    # 9 rows are 3 for each of the 4 attention ranks, 2 are 1 for each, padding included.
    assert rows_by_ep(StepRows(plan, 5, (9, 2))) == (6, 6, 2, 2)
    assert rows_by_ep(StepRows(plan, 0, (0, 2))) == (0, 0, 2, 2)


def test_a_rank_takes_its_share_alone() -> None:
    """Read without weights, as a plan's report and the memory check do."""
    spec, plan = FAMILIES["deepseek_v3"].spec, Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)
    placement = default_placement(NUM_EXPERTS, 2, 0)
    shapes = ShapeReader(torch.bfloat16)
    context = replace(
        context_of(places(plan, 3), Layout.ROWS, placement),
        weights=shapes,
        device=torch.device("meta"),
    )
    MoELayer(context, shapes, spec, LAYER)
    gate, shared = NUM_EXPERTS * (HIDDEN + 2), 3 * HIDDEN * 2 * SIZE  # a bias is float32
    experts = NUM_EXPERTS // 2 * 3 * HIDDEN * SIZE // 2
    assert shapes.num_bytes == 2 * (gate + shared + experts)
