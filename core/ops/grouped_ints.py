"""Matrices of 4- and 8-bit numbers in groups of 32: dequantised, and multiplied in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.ops import LinearKernel
from core.interfaces.weights import GROUP, GroupedInts
from core.ops.precision import accurate


def dequantize(weight: GroupedInts, dtype: torch.dtype) -> Tensor:
    """The matrix, computed in float32 and rounded once."""
    if weight.values_OI.is_meta:
        return torch.empty(weight.values_OI.shape, dtype=dtype, device="meta")
    values_OGX = weight.values_OI.float().unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call]
    values_OGX = values_OGX * weight.scales_OG.unsqueeze(2) + weight.minimums_OG.unsqueeze(2)
    matrix: Tensor = values_OGX.flatten(1).to(dtype)
    return matrix


def linear(weight: GroupedInts, bias_O: Tensor | None) -> LinearKernel:
    """x @ W.T + b over the dequantised weight, in float32 or wider: the oracle."""
    weight_OI = dequantize(weight, torch.float32)

    def run(x_TI: Tensor) -> Tensor:
        x_wide = accurate(x_TI)
        bias_wide = None if bias_O is None else bias_O.to(x_wide.dtype)
        return F.linear(x_wide, weight_OI.to(x_wide.dtype), bias_wide).to(x_TI.dtype)

    return run
