"""Routing and experts of every set of operations, against float64 written out here.

Triton's kernels run in its interpreter where there is no GPU; with one, `-k cuda` runs them there.
Shape legend: see core.kernels.torch_moe.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched, Routes
from core.interfaces.ops import ExpertWeights, LinearKernel, Ops
from core.interfaces.routing import Routing
from core.interfaces.weights import BlockFp8
from core.kernels.block_fp8 import dequantize, dequantize_rows, quantize, quantize_rows
from core.kernels.cpu_ops import CpuOps
from core.kernels.moe_permute import sum_grouped
from core.kernels.torch_ops import TorchOps
from core.kernels.triton_ops import TritonOps

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETS: list[tuple[str, Callable[[], Ops], torch.device]] = [
    ("torch", TorchOps, CPU),
    ("cpu", CpuOps, CPU),
]
if torch.cuda.is_available():
    SETS += [("torch-cuda", TorchOps, GPU), ("triton-cuda", TritonOps, GPU)]
else:
    SETS.append(("triton-interpreted", TritonOps, CPU))
TRITON = SETS[-1]

# Results are rounded more than once: products, silu and sums in the model's dtype on a CPU.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_set = pytest.mark.parametrize(
    ("ops", "device"), [(make(), device) for _, make, device in SETS], ids=[s[0] for s in SETS]
)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    needs_fp8 = pytest.mark.skip("needs a GPU that multiplies fp8")
else:
    needs_fp8 = pytest.mark.filterwarnings("default")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """By norm, which is NaN if any value is."""
    if expected.numel() == 0:
        return 0.0
    return ((result.cpu().double() - expected).norm() / expected.norm()).item()


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
    for logits, weights, ids in zip(
        logits_TX.tolist(), weights_TK.tolist(), ids_TK.tolist(), strict=True
    ):
        expected = route(logits, biases, routing)
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(expected, rel=2e-5)


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


# --- experts -------------------------------------------------------------------------------------

COUNTS = {
    "mixed": [3, 0, 17, 1],
    "one": [0, 70, 0, 0],
    "first": [5, 0, 0, 0],
    "none": [0, 0, 0, 0],
    "even": [16, 16, 16, 16],
}
each_counts = pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
each_layout = pytest.mark.parametrize("batched", [False, True], ids=["contiguous", "batched"])


def weights(num_experts: int, hidden_size: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    gate_up = normal(1, num_experts, 2 * size, hidden_size) * hidden_size**-0.5
    down = normal(2, num_experts, hidden_size, size) * size**-0.5
    return [gate_up.to(dtype), down.to(dtype)]


def pairs_of(
    gate_up_L: Sequence[BlockFp8] | Tensor,
    down_L: Sequence[BlockFp8] | Tensor,
    device: torch.device,
) -> Iterator[ExpertWeights]:
    """One expert after the other, as `Ops.experts` takes them in."""

    def there(matrix: BlockFp8 | Tensor) -> BlockFp8 | Tensor:
        if isinstance(matrix, BlockFp8):
            return BlockFp8(matrix.values_OI.to(device), matrix.scales.to(device))
        return matrix.to(device)

    for gate_up, down in zip(gate_up_L, down_L, strict=True):
        yield there(gate_up), there(down)


def expected_of(x_ME: Tensor, gate_up_2IE: Tensor, down_EI: Tensor) -> Tensor:
    """One expert in float64."""
    gate, up = (x_ME.double() @ gate_up_2IE.double().T).chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up) @ down_EI.double().T


def arranged(
    parts: Sequence[Tensor], batched: bool, device: torch.device, scales: Sequence[Tensor] = ()
) -> Dispatched:
    """Rows of each expert as a dispatcher hands them over; what is in between is NaN."""
    counts_L = torch.tensor([len(part) for part in parts], device=device)

    def lie(parts: Sequence[Tensor]) -> Tensor:
        if not batched:
            return torch.cat(list(parts)).to(device)
        capacity = max(len(part) for part in parts)
        whole = torch.full((len(parts), capacity, parts[0].shape[1]), torch.nan)
        for place, part in zip(whole, parts, strict=True):
            place[: len(part)] = part.float()
        return whole.to(device, parts[0].dtype)

    return Dispatched(lie(parts), counts_L, None, lie(scales) if scales else None)


def results_of(out: Tensor, counts: list[int]) -> list[Tensor]:
    if out.dim() == 3:
        return [rows[:count] for rows, count in zip(out, counts, strict=True)]
    return list(out[: sum(counts)].split(counts))


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


def routes_of(num_rows: int, top_k: int, num_experts: int) -> Routes:
    generator = torch.Generator().manual_seed(num_rows)
    order = torch.rand(num_rows, num_experts + 3, generator=generator).argsort(1)[:, :top_k]
    experts_TK = torch.where(order < num_experts, order, -1)
    experts_TK[num_rows - num_rows // 5 :] = -1
    return Routes(experts_TK, torch.rand(num_rows, top_k, generator=generator))


def arrived(x_TE: Tensor, routes: Routes, device: torch.device) -> Dispatched:
    moved = Routes(routes.experts_TK.to(device), routes.weights_TK.to(device))
    no_counts = torch.empty(0, dtype=torch.int64, device=device)
    return Dispatched(x_TE.to(device), no_counts, None, routes=moved)


# --- fp8 blocks ----------------------------------------------------------------------------------


def uneven(seed: int, matrix: Tensor, rows: int = 128) -> Tensor:
    """Blocks of very different sizes, so that a scale taken for another's shows."""
    shape = (-(-matrix.shape[0] // rows), -(-matrix.shape[1] // 128))
    powers = 2.0 ** torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    spread = powers.repeat_interleave(rows, 0).repeat_interleave(128, 1)
    return (matrix.float() * spread[: matrix.shape[0], : matrix.shape[1]]).to(matrix.dtype)


def quantized(weight_LOI: Tensor) -> list[BlockFp8]:
    return [quantize(uneven(i, matrix)) for i, matrix in enumerate(weight_LOI)]


# A GPU's sums of fp8 products keep some 14 bits, so that values between two fp8 numbers go the
# other way now and then; Triton's interpreter cuts to fp8 what a GPU rounds.
ROUGH = 3e-2 if torch.cuda.is_available() else 1.5e-1


def rounded(x_ME: Tensor) -> Tensor:
    """What fp8 leaves of rows."""
    return dequantize_rows(*quantize_rows(x_ME), torch.float32)


@needs_fp8
@pytest.mark.parametrize("given", ["rows", "fp8 rows"])
@each_counts
@each_layout
def test_triton_experts_of_fp8_blocks(counts: list[int], batched: bool, given: str) -> None:
    """The same as computing with what fp8 leaves of weights, rows, and rows in between."""
    _, make, device = TRITON
    hidden_size, size, dtype = 200, 256, torch.bfloat16
    gate_up_L, down_L = (
        quantized(w) for w in weights(len(counts), hidden_size, size, torch.float32)
    )
    parts = [
        uneven(7 + i, normal(3 + i, n, hidden_size, dtype=dtype), rows=1)
        for i, n in enumerate(counts)
    ]
    kernel = make().experts(pairs_of(gate_up_L, down_L, device), len(down_L), dtype)
    if given == "rows":
        dispatched = arranged(parts, batched, device)
    else:
        pairs = [quantize_rows(part) for part in parts]
        dispatched = arranged([p[0] for p in pairs], batched, device, [p[1] for p in pairs])
        if batched:  # DeepEP's scales lie by columns
            assert dispatched.scales is not None
            by_columns = dispatched.scales.transpose(1, 2).contiguous().transpose(1, 2)
            dispatched = Dispatched(dispatched.hidden, dispatched.counts_L, None, by_columns)
    out = kernel(dispatched)
    assert out.dtype == dtype
    assert out.shape == dispatched.hidden.shape
    for result, part, gate_up, down in zip(
        results_of(out, counts), parts, gate_up_L, down_L, strict=True
    ):
        gate, up = (
            (rounded(part).double() @ dequantize(gate_up, torch.float64).T).float().chunk(2, dim=-1)
        )
        middle = rounded(gate.sigmoid() * gate * up).double()
        # A value at the edge of two fp8 numbers may go either way.
        assert relative_error(result, middle @ dequantize(down, torch.float64).T) <= ROUGH


@each_set
@each_layout
def test_every_set_takes_fp8_blocks_and_rows(ops: Ops, device: torch.device, batched: bool) -> None:
    counts, dtype = [3, 0, 5], torch.float32
    gate_up_L, down_L = (quantized(w) for w in weights(3, 128, 128, torch.float32))
    parts = [quantize_rows(normal(3 + i, n, 128)) for i, n in enumerate(counts)]
    dispatched = arranged([p[0] for p in parts], batched, device, [p[1] for p in parts])
    out = ops.experts(pairs_of(gate_up_L, down_L, device), len(down_L), dtype)(dispatched)
    for result, part, *matrices in zip(
        results_of(out, counts), parts, gate_up_L, down_L, strict=True
    ):
        x_ME = dequantize_rows(*part, torch.float32)
        expected = expected_of(x_ME, *(dequantize(m, torch.float32) for m in matrices))
        assert relative_error(result, expected) <= 5e-2 + ROUGH  # rows in between may be fp8


@needs_fp8
@pytest.mark.parametrize("rows", [0, 1, 17, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 128), (300, 200), (64, 384)])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_linear_of_fp8_blocks(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    _, make, device = TRITON
    weight = quantize(uneven(1, normal(1, outputs, inputs)))
    bias_O = normal(2, outputs).bfloat16() * 100 if biased else None
    # Values that fp8 holds, and one in each block that makes its scale a power of two.
    wide_TX = normal(3, rows, 2 * inputs).to(torch.float8_e4m3fn).float()
    wide_TX[:, inputs % 128 :: 128] = 448.0
    x_TI = uneven(4, wide_TX[:, inputs:], rows=1)
    wide_TX[:, inputs:] = x_TI
    x_TI = wide_TX.bfloat16()[:, inputs:]  # rows lie apart
    assert torch.equal(rounded(x_TI), x_TI.float())
    kernel = make().linear(
        BlockFp8(weight.values_OI.to(device), weight.scales.to(device)),
        None if bias_O is None else bias_O.to(device),
    )
    result = kernel(x_TI.to(device))
    assert result.dtype == torch.bfloat16
    assert result.shape == (rows, outputs)
    expected = x_TI.double() @ dequantize(weight, torch.float64).T
    expected += 0 if bias_O is None else bias_O.double()
    assert relative_error(result, expected) <= 5e-3


@each_set
def test_every_set_takes_linear_layers_of_fp8_blocks(ops: Ops, device: torch.device) -> None:
    weight, x_TI = quantize(normal(1, 160, 256)), normal(3, 5, 256)
    moved = BlockFp8(weight.values_OI.to(device), weight.scales.to(device))
    expected = x_TI.double() @ dequantize(weight, torch.float64).T
    assert relative_error(ops.linear(moved, None)(x_TI.to(device)), expected) <= 5e-2


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


@needs_fp8
@pytest.mark.parametrize("num_rows", [1, 9, 16, 40])
def test_triton_experts_of_fp8_blocks_sum_rows_with_routes(num_rows: int) -> None:
    """The same as the same rows grouped beforehand."""
    _, make, device = TRITON
    hidden_size, size, dtype = 200, 256, torch.bfloat16
    pairs = (quantized(w) for w in weights(5, hidden_size, size, torch.float32))
    kernel = make().experts(pairs_of(*pairs, device), 5, dtype)
    x_TE, routes = normal(3, num_rows, hidden_size, dtype=dtype), routes_of(num_rows, 3, 5)
    out = kernel(arrived(x_TE, routes, device))
    on_device = arrived(x_TE, routes, device)
    assert on_device.routes is not None
    expected = sum_grouped(kernel, on_device.hidden, on_device.routes, 5, dtype)
    assert relative_error(out, expected.cpu().double()) <= 1e-2


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
