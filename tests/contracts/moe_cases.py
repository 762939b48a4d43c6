"""What tests of experts share: sets of operations, weights, and rows as they arrive.

Shape legend: see core.ops.torch_moe.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from core.devices.cpu.cpu_ops import CpuOps
from core.devices.cuda.triton_ops import TritonOps
from core.interfaces.moe_a2a import Dispatched, Routes
from core.interfaces.ops import ExpertWeights, Ops
from core.interfaces.weights import BlockFp8
from core.ops.torch_ops import TorchOps

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
    ("ops", "device"),
    [
        # The interpreter is slow: `make test` takes pairs of a test's other parameters there.
        pytest.param(
            make(), device, id=name, marks=pytest.mark.pairwise if "interpreted" in name else ()
        )
        for name, make, device in SETS
    ],
)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
COUNTS = {
    "mixed": [3, 0, 17, 1],
    "one": [0, 70, 0, 0],
    "first": [5, 0, 0, 0],
    "none": [0, 0, 0, 0],
    "even": [16, 16, 16, 16],
}
each_counts = pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
each_layout = pytest.mark.parametrize("batched", [False, True], ids=["contiguous", "batched"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """By norm, which is NaN if any value is."""
    if expected.numel() == 0:
        return 0.0
    return ((result.cpu().double() - expected).norm() / expected.norm()).item()


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
