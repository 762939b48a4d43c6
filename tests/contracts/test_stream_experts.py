"""The Gluon kernel of experts for few rows against float64, on a Hopper GPU.

Gluon kernels run in no interpreter, so that there is nothing to test elsewhere. Shape legend: see
core.kernels.gluon_experts.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
CASES = {  # experts, hidden, middle, choices
    "qwen3_30b": (128, 2048, 768, 8),
    "few": (3, 256, 128, 2),
    "one": (1, 128, 128, 1),
    "many": (200, 512, 384, 6),
    "wide": (16, 2048, 1536, 8),
    "tight": (4, 1024, 128, 2),  # of which nothing of shared memory would be left over
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def experts_of(case: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    num_experts, size_E, size_I, _ = case
    torch.manual_seed(1)
    shapes = (num_experts, 2 * size_I, size_E), (num_experts, size_E, size_I)
    gate_up, down = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda") * shape[2] ** -0.5
        for shape in shapes
    )
    return gate_up, down


def right_of(
    gate_up: Tensor, down: Tensor, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    sums_TE = torch.zeros(x_TE.shape, dtype=torch.float64, device="cuda")
    for expert in experts_TK[experts_TK >= 0].unique().tolist():
        rows, choices = (experts_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TE[rows].double(), gate_up[expert].double()).chunk(2, dim=1)
        result = F.linear(F.silu(gate) * up, down[expert].double())
        sums_TE[rows] += weights_TK[rows, choices, None] * result
    return sums_TE


def routes(num_rows: int, num_experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.rand((num_rows, num_experts), generator=source).topk(top_k, dim=1).indices
    left_out = torch.rand((num_rows, top_k), generator=source) < 0.2
    weights = torch.rand((num_rows, top_k), generator=source)
    return ids.masked_fill(left_out, -1).cuda(), weights.cuda()


@each_case
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16])
def test_equals_float64(case: tuple[int, int, int, int], num_rows: int) -> None:
    gluon = importlib.import_module("core.kernels.gluon_experts")
    num_experts, size_E, _, top_k = case
    gate_up, down = experts_of(case)
    assert gluon.takes(gate_up, down)
    streamed = gluon.StreamedExperts(gate_up, down)
    for seed in range(3):
        x_TE = torch.randn((num_rows, size_E), dtype=torch.bfloat16, device="cuda")
        chosen = routes(num_rows, num_experts, top_k, seed)
        outs = [streamed(x_TE, *chosen) for _ in range(2)]
        right = right_of(gate_up, down, x_TE, *chosen)
        assert float((outs[0].double() - right).norm()) <= 1e-2 * float(right.norm())
        assert torch.equal(*outs)


@each_case
def test_rows_that_chose_nothing_are_zero(case: tuple[int, int, int, int]) -> None:
    gluon = importlib.import_module("core.kernels.gluon_experts")
    num_experts, size_E, _, top_k = case
    streamed = gluon.StreamedExperts(*experts_of(case))
    x_TE = torch.randn((5, size_E), dtype=torch.bfloat16, device="cuda")
    nothing = torch.full((5, top_k), -1, device="cuda")
    weights = torch.ones((5, top_k), device="cuda")
    assert not streamed(x_TE, nothing, weights).any()
    nothing[2] = torch.arange(top_k, device="cuda") % num_experts
    out_TE = streamed(x_TE, nothing, weights)
    assert out_TE[2].any()
    assert not out_TE[[0, 1, 3, 4]].any()


def test_a_row_s_nan_stays_there() -> None:
    gluon = importlib.import_module("core.kernels.gluon_experts")
    case = CASES["few"]
    streamed = gluon.StreamedExperts(*experts_of(case))
    x_TE = torch.randn((8, case[1]), dtype=torch.bfloat16, device="cuda")
    experts_TK = torch.tensor([[0, 1], [1, 2]] * 4, device="cuda")
    weights_TK = torch.ones((8, 2), device="cuda")
    right = streamed(x_TE, experts_TK, weights_TK)
    x_TE[3] = torch.nan
    out_TE = streamed(x_TE, experts_TK, weights_TK)
    others = [row for row in range(8) if row != 3]
    assert torch.equal(out_TE[others], right[others])
    assert out_TE[3].isnan().all()


def test_a_graph_of_launches_repeats() -> None:
    """Counts are as the next launch expects them, also of other numbers of rows."""
    gluon = importlib.import_module("core.kernels.gluon_experts")
    case = CASES["qwen3_30b"]
    num_experts, size_E, _, top_k = case
    gate_up, down = experts_of(case)
    streamed = gluon.StreamedExperts(gate_up, down)
    steps = [
        (
            torch.randn((num_rows, size_E), dtype=torch.bfloat16, device="cuda"),
            *routes(num_rows, num_experts, top_k, num_rows),
        )
        for num_rows in (8, 1, 16, 5)
    ]
    rights = [streamed(*step) for step in steps]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [streamed(*step) for step in steps]
    for _ in range(50):
        graph.replay()
    for out, right in zip(outs, rights, strict=True):
        assert torch.equal(out, right)
