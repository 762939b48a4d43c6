"""The operations of mixtures of experts on a CPU: one pair of matrix products for each expert.

The host knows the counts, so an expert without rows costs nothing. The oracle is
core.ops.torch_moe. Shape legend: see there.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices.cpu.cpu_linear import multiply_packed, pack, packs
from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import ExpertKernel, ExpertWeights
from core.interfaces.weights import BlockFp8, ExpertWeight, plain
from core.ops.block_fp8 import dequantize
from core.ops.moe_permute import sum_grouped
from core.ops.torch_moe import TorchMoeOps, expert_rows, plain_rows


class _Dense:
    """Matrices as they are, multiplied by torch."""

    def keep(self, weight_OI: Tensor) -> Tensor:
        return weight_OI

    def replace(self, kept: Tensor, weight_OI: Tensor) -> Tensor:
        return kept.copy_(weight_OI)

    def multiply(self, x_TI: Tensor, kept: Tensor) -> Tensor:
        return F.linear(x_TI, kept)

    def matrix(self, kept: Tensor) -> Tensor:
        return kept


class _Packed(_Dense):
    """Matrices in oneDNN's layout only: a second copy would double the memory."""

    def keep(self, weight_OI: Tensor) -> Tensor:
        return pack(weight_OI)

    def replace(self, kept: Tensor, weight_OI: Tensor) -> Tensor:
        return pack(weight_OI)

    def multiply(self, x_TI: Tensor, kept: Tensor) -> Tensor:
        return multiply_packed(x_TI, kept, None)

    def matrix(self, kept: Tensor) -> Tensor:
        return kept.to_dense()


class CpuExperts:
    """core.interfaces.ops.ExpertKernel over two matrices for each expert."""

    def __init__(self, experts: Iterable[ExpertWeights], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._form = _Packed() if packs(dtype) else _Dense()
        self._gate_up_L: list[Tensor] = []
        self._down_L: list[Tensor] = []
        for gate_up_2IE, down_EI in experts:
            self._gate_up_L.append(self._form.keep(_in_dtype(gate_up_2IE, dtype)))
            self._down_L.append(self._form.keep(_in_dtype(down_EI, dtype)))

    def __call__(self, dispatched: Dispatched) -> Tensor:
        if dispatched.routes is not None:
            num_experts = len(self._down_L)
            return sum_grouped(self, dispatched, dispatched.routes, num_experts, self._dtype)
        hidden = plain_rows(dispatched, self._dtype)
        out = torch.empty_like(hidden, dtype=self._dtype)
        counts = dispatched.counts_L.tolist()
        results = expert_rows(out, counts)
        for (expert, x_ME), (_, out_ME) in zip(expert_rows(hidden, counts), results, strict=True):
            gate_up_M2I = self._form.multiply(x_ME, self._gate_up_L[expert])
            gate_MI, up_MI = gate_up_M2I.chunk(2, dim=-1)
            out_ME.copy_(self._form.multiply(F.silu(gate_MI).mul_(up_MI), self._down_L[expert]))
        return out

    def read(self, expert: int) -> tuple[ExpertWeight, ExpertWeight]:
        return (
            self._form.matrix(self._gate_up_L[expert]),
            self._form.matrix(self._down_L[expert]),
        )

    def write(self, expert: int, gate_up_2IE: ExpertWeight, down_EI: ExpertWeight) -> None:
        replace, gate_up_L, down_L = self._form.replace, self._gate_up_L, self._down_L
        gate_up_L[expert] = replace(gate_up_L[expert], plain(gate_up_2IE))
        down_L[expert] = replace(down_L[expert], plain(down_EI))


class CpuMoeOps(TorchMoeOps):
    """The part of core.interfaces.ops.Ops that mixtures of experts need, on a CPU."""

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Packed matrices where the machine multiplies the dtype; fp8 blocks are dequantised."""
        return CpuExperts(experts, dtype)


def _in_dtype(weight: ExpertWeight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, BlockFp8) else weight
