"""Matrices and rows in float8_e4m3fn with block scales: to and from it, in plain torch.

Weights have one scale for each 128 x 128 values, rows (activations) one for each 128 columns, as
DeepSeek-V3's checkpoints and kernels do; value = stored * scale. Knows nothing of devices or speed.
Shape legend: O outputs, I inputs, T rows, E columns; B blocks of O, C blocks of I or E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8
from core.ops.precision import accurate

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def num_blocks(size: int) -> int:
    """Blocks that cover `size` values; the last may be smaller."""
    return -(-size // BLOCK)


def dequantize(weight: BlockFp8, dtype: torch.dtype) -> Tensor:
    """The matrix, or each of stacked ones (L, O, I), multiplied in float32 and rounded once."""
    values = weight.values_OI
    if values.is_meta:  # of a model that only is measured; torch would import its compiler
        return torch.empty(values.shape, dtype=dtype, device=values.device)
    num_outputs, num_inputs = values.shape[-2:]
    if values.dim() == 3:
        experts = zip(values, weight.scales, strict=True)
        parts = [dequantize(BlockFp8(*expert), dtype) for expert in experts]
        return torch.stack(parts) if parts else values.to(dtype)
    scales_OC = weight.scales.float().repeat_interleave(BLOCK, 0)[:num_outputs]
    scales_OI = scales_OC.repeat_interleave(BLOCK, 1)[:, :num_inputs]
    return (values.float() * scales_OI).to(dtype)


def quantize(weight_OI: Tensor) -> BlockFp8:
    """A matrix by blocks of 128 x 128, each scaled so that its largest value is fp8's largest."""
    num_outputs, num_inputs = weight_OI.shape
    blocks_BC = (num_blocks(num_outputs), num_blocks(num_inputs))
    padding = (0, blocks_BC[1] * BLOCK - num_inputs, 0, blocks_BC[0] * BLOCK - num_outputs)
    padded = F.pad(weight_OI.float(), padding).view(blocks_BC[0], BLOCK, blocks_BC[1], BLOCK)
    scales_BC = _scales(padded.abs().amax((1, 3)))
    values = (padded / scales_BC[:, None, :, None]).to(FP8).flatten(2).flatten(0, 1)
    return BlockFp8(values[:num_outputs, :num_inputs].contiguous(), scales_BC)


def quantize_rows(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of any shape before their last dimension: (values in fp8, float32 scales with
    ceil(E / 128) columns)."""
    size, blocks = x_TE.shape[-1], num_blocks(x_TE.shape[-1])
    padded = F.pad(x_TE.float(), (0, blocks * BLOCK - size)).view(*x_TE.shape[:-1], blocks, BLOCK)
    scales_TC = _scales(padded.abs().amax(-1))
    values = (padded / scales_TC.unsqueeze(-1)).to(FP8).flatten(-2)
    return values[..., :size].contiguous(), scales_TC


def dequantize_rows(values_TE: Tensor, scales_TC: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows, multiplied in float32 and rounded once."""
    scales_TE = scales_TC.float().repeat_interleave(BLOCK, -1)[..., : values_TE.shape[-1]]
    return (values_TE.float() * scales_TE).to(dtype)


def linear(weight: BlockFp8, bias_O: Tensor | None) -> LinearKernel:
    """x @ W.T + b over the dequantised weight, in float32 or wider: the oracle of fp8 kernels."""
    weight_OI = dequantize(weight, torch.float32)

    def run(x_TI: Tensor) -> Tensor:
        x_wide = accurate(x_TI)
        bias_wide = None if bias_O is None else bias_O.to(x_wide.dtype)
        return F.linear(x_wide, weight_OI.to(x_wide.dtype), bias_wide).to(x_TI.dtype)

    return run


def _scales(largest: Tensor) -> Tensor:
    """By what to divide; 1 where all values are 0."""
    return torch.where(largest > 0, largest / LARGEST, 1.0)
