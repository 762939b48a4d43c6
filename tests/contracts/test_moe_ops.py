"""Routing and experts of every set of operations, against float64 written out here.

Triton's kernels run in its interpreter where there is no GPU; with one, `-k cuda` runs them there.
Shape legend: see core.ops.torch_moe.
"""

import pytest
import torch
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import LinearKernel, Ops
from core.interfaces.routing import Routing
from core.ops.torch_ops import TorchOps
from tests.contracts.moe_cases import (
    TOLERANCE,
    arranged,
    arrived,
    each_counts,
    each_dtype,
    each_layout,
    each_set,
    expected_of,
    normal,
    pairs_of,
    relative_error,
    results_of,
    routes_of,
    weights,
)

# --- routing -------------------------------------------------------------------------------------


def route(logits_X: list[float], bias_X: list[float], routing: Routing) -> dict[int, float]:
    """One row, as the papers say it, in Python's floats: expert -> weight."""
    logits = torch.tensor(logits_X, dtype=torch.float64)
    scores = (logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(0)).tolist()
    worth = [score + bias for score, bias in zip(scores, bias_X, strict=True)]
    size = len(worth) // routing.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(routing.num_groups)]
    if routing.num_groups > 1:
        groups.sort(key=lambda group: -sum(sorted(worth[e] for e in group)[-routing.group_top :]))
        groups = groups[: routing.num_chosen_groups]
    allowed = sorted((e for group in groups for e in group), key=lambda e: -worth[e])
    chosen = {expert: scores[expert] for expert in allowed[: routing.top_k]}
    total = sum(chosen.values()) if routing.normalise else 1.0
    return {expert: score / total * routing.scale for expert, score in chosen.items()}


ROUTINGS = {
    "mixtral": (8, Routing(top_k=2, scoring="softmax", normalise=True)),
    "qwen3": (128, Routing(top_k=8, scoring="softmax", normalise=True)),
    "v2-lite": (64, Routing(top_k=6, scoring="softmax", normalise=False)),
    "v2": (
        160,
        Routing(
            top_k=6,
            scoring="softmax",
            normalise=False,
            scale=16.0,
            num_groups=8,
            num_chosen_groups=3,
        ),
    ),
    "v3": (
        256,
        Routing(
            top_k=8,
            scoring="sigmoid",
            normalise=True,
            scale=2.5,
            num_groups=8,
            num_chosen_groups=4,
            group_top=2,
        ),
    ),
    "odd": (6, Routing(top_k=3, scoring="sigmoid", normalise=False, num_groups=2, group_top=2)),
    "all": (4, Routing(top_k=4, scoring="softmax", normalise=True)),
}


@each_set
@pytest.mark.parametrize("name", list(ROUTINGS))
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_grouped_top_k(ops: Ops, device: torch.device, name: str, biased: bool, rows: int) -> None:
    num_experts, routing = ROUTINGS[name]
    logits_TX = normal(1, rows, num_experts) * 2
    bias_X = normal(2, num_experts) * 0.3 if biased else None
    weights_TK, ids_TK = ops.grouped_top_k(
        logits_TX.to(device), None if bias_X is None else bias_X.to(device), routing
    )
    assert weights_TK.dtype == torch.float32
    assert ids_TK.dtype == torch.int64
    assert weights_TK.shape == ids_TK.shape == (rows, routing.top_k)
    biases = [0.0] * num_experts if bias_X is None else bias_X.tolist()
    for logits, found, ids in zip(
        logits_TX.tolist(), weights_TK.tolist(), ids_TK.tolist(), strict=True
    ):
        expected = route(logits, biases, routing)
        assert dict(zip(ids, found, strict=True)) == pytest.approx(expected, rel=2e-5)


@each_set
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ids_are_valid_whatever_the_logits(ops: Ops, device: torch.device, scoring: str) -> None:
    routing = Routing(top_k=4, scoring=scoring, normalise=True, scale=1.0)
    logits_TX = torch.stack(
        [
            torch.full((16,), torch.nan),
            torch.full((16,), 3.0),
            torch.tensor([-1e30] * 15 + [1e30]),
            torch.tensor([torch.nan] + [0.5] * 15),
        ]
    )
    _, ids_TK = ops.grouped_top_k(logits_TX.to(device), None, routing)
    for ids in ids_TK.tolist():
        assert len(set(ids)) == 4
        assert all(0 <= expert < 16 for expert in ids)


@each_set
@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_gate_does_not_round(ops: Ops, device: torch.device, dtype: torch.dtype, rows: int) -> None:
    weight_XE, x_TE = normal(1, 16, 96, dtype=dtype), normal(2, rows, 96, dtype=dtype)
    result_TX = ops.gate(weight_XE.to(device))(x_TE.to(device))
    assert result_TX.dtype == torch.float32
    assert result_TX.shape == (rows, 16)
    assert relative_error(result_TX, x_TE.double() @ weight_XE.double().T) <= 2e-6


@each_set
def test_experts_drawn_at_random_are_uniform(ops: Ops, device: torch.device) -> None:
    """Every expert about as often, whatever the bias; the same ids on every device."""
    num_experts, num_rows = 16, 400
    routing = Routing(
        top_k=4, scoring="sigmoid", normalise=False, num_groups=4, num_chosen_groups=2
    ).uniform()
    logits_TX = normal(1, num_rows, num_experts) * 0.01 + 3
    bias_X = torch.arange(num_experts, dtype=torch.float32)
    weights_TK, ids_TK = ops.grouped_top_k(logits_TX.to(device), bias_X.to(device), routing)
    assert torch.allclose(weights_TK.sum(1).cpu(), torch.ones(num_rows))
    assert all(len(set(ids)) == 4 for ids in ids_TK.tolist())
    counts_X = torch.bincount(ids_TK.flatten().cpu(), minlength=num_experts).double()
    expected = num_rows * 4 / num_experts
    chi_square = ((counts_X - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001
    same_ids_TK = TorchOps().grouped_top_k(logits_TX, None, routing)[1]
    assert torch.equal(ids_TK.cpu().sort(1).values, same_ids_TK.sort(1).values)


# --- experts -------------------------------------------------------------------------------------


@each_set
@each_dtype
@each_counts
@each_layout
@pytest.mark.parametrize(("hidden_size", "size"), [(96, 40), (64, 128)])
def test_experts(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    counts: list[int],
    batched: bool,
    hidden_size: int,
    size: int,
) -> None:
    gate_up, down = weights(len(counts), hidden_size, size, dtype)
    parts = [normal(3 + i, n, hidden_size, dtype=dtype) for i, n in enumerate(counts)]
    kernel = ops.experts(pairs_of(gate_up, down, device), len(down), dtype)
    dispatched = arranged(parts, batched, device)
    out = kernel(dispatched)
    assert out.shape == dispatched.hidden.shape
    assert out.dtype == dtype
    for result, part, *matrices in zip(results_of(out, counts), parts, gate_up, down, strict=True):
        assert relative_error(result, expected_of(part, *matrices)) <= TOLERANCE[dtype]


@each_set
def test_rows_past_the_counts_are_left_alone(ops: Ops, device: torch.device) -> None:
    gate_up, down = weights(3, 64, 32, torch.float32)
    parts = [normal(3 + i, n, 64) for i, n in enumerate([2, 0, 4])]
    dispatched = arranged(parts, False, device)
    longer = torch.cat((dispatched.hidden, torch.full((20, 64), torch.nan, device=device)))
    out = ops.experts(pairs_of(gate_up, down, device), len(down), torch.float32)(
        Dispatched(longer, dispatched.counts_L, None)
    )
    assert out.shape == longer.shape
    for result, part, *matrices in zip(
        results_of(out, [2, 0, 4]), parts, gate_up, down, strict=True
    ):
        assert relative_error(result, expected_of(part, *matrices)) <= TOLERANCE[torch.float32]


@each_set
@each_dtype
def test_an_expert_can_be_read_and_replaced(
    ops: Ops, device: torch.device, dtype: torch.dtype
) -> None:
    gate_up, down = weights(2, 96, 40, dtype)
    kernel = ops.experts(pairs_of(gate_up, down, device), len(down), dtype)
    moved = [matrix.clone() for matrix in kernel.read(1) if isinstance(matrix, Tensor)]
    assert [torch.equal(a.cpu(), b[1]) for a, b in zip(moved, (gate_up, down), strict=True)]
    new_gate_up, new_down = (-matrix for matrix in moved)
    kernel.write(0, new_gate_up, new_down)
    read_gate_up, read_down = kernel.read(0)
    assert torch.equal(read_gate_up, new_gate_up)
    assert torch.equal(read_down, new_down)
    parts = [normal(5, 3, 96, dtype=dtype), normal(6, 2, 96, dtype=dtype)]
    first, second = results_of(kernel(arranged(parts, False, device)), [3, 2])
    assert relative_error(first, expected_of(parts[0], -gate_up[1], -down[1])) <= TOLERANCE[dtype]
    assert relative_error(second, expected_of(parts[1], gate_up[1], down[1])) <= TOLERANCE[dtype]


@each_set
@each_dtype
@pytest.mark.parametrize(
    ("num_rows", "top_k"), [(0, 2), (1, 3), (5, 1), (9, 7), (16, 8), (17, 8), (40, 2), (130, 4)]
)
def test_experts_sum_rows_with_routes(
    ops: Ops, device: torch.device, dtype: torch.dtype, num_rows: int, top_k: int
) -> None:
    """Some pairs have no expert here, and some rows none at all."""
    gate_up, down = weights(7, 96, 40, dtype)
    x_TE, routes = normal(3, num_rows, 96, dtype=dtype), routes_of(num_rows, top_k, 7)
    expected = torch.zeros(num_rows, 96, dtype=torch.float64)
    for row, of_row in enumerate(routes.experts_TK.tolist()):
        for expert, weight in zip(of_row, routes.weights_TK[row].tolist(), strict=True):
            if expert >= 0:
                result = expected_of(x_TE[row, None], gate_up[expert], down[expert])
                expected[row] += weight * result[0]
    kernel = ops.experts(pairs_of(gate_up, down, device), len(down), dtype)
    out = kernel(arrived(x_TE, routes, device))
    assert out.shape == x_TE.shape
    assert out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    assert not out.cpu()[(routes.experts_TK < 0).all(1)].any()


# --- work beside other work ----------------------------------------------------------------------


def layers_beside(ops: Ops, weights: list[Tensor], x_TE: Tensor) -> Tensor:
    """Layers that each add the work beside to work of their own, as a model does. On a GPU both
    take long enough for one that doesn't wait for the other to be too early."""

    def sleep() -> None:
        if x_TE.device.type == "cuda":
            torch.cuda._sleep(20_000)  # cycles

    for weight_EE in weights:
        linear = ops.linear(weight_EE, None)

        def work(x_TE: Tensor, linear: LinearKernel = linear) -> Tensor:
            sleep()
            return linear(x_TE)

        sleep()
        beside = ops.beside(work, x_TE)
        own_TE = ops.rms_norm(x_TE, torch.ones_like(weight_EE[0]), 1e-6)
        own_TE = own_TE + torch.full_like(own_TE, 0.5)
        x_TE = own_TE + beside()
    return x_TE


@each_set
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_work_beside_other_work_is_whole_when_asked_for(
    ops: Ops, device: torch.device, rows: int
) -> None:
    weights = [normal(layer, 64, 64) / 8 for layer in range(24)]
    x_TE = normal(99, rows, 64)
    expected_TE = x_TE.double()
    for weight_EE in weights:
        scale_T1 = torch.rsqrt(expected_TE.square().mean(1, keepdim=True) + 1e-6)
        expected_TE = expected_TE * scale_T1 + 0.5 + expected_TE @ weight_EE.double().T
    on_device = [weight_EE.to(device) for weight_EE in weights]
    result_TE = layers_beside(ops, on_device, x_TE.to(device))
    assert relative_error(result_TE, expected_TE) < 1e-5
    if device.type != "cuda" or rows == 0:
        return
    given_TE = x_TE.to(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TE = layers_beside(ops, on_device, given_TE)
    for _ in range(3):
        captured_TE.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured_TE, result_TE)
