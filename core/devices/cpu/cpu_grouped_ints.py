"""Products with matrices of 4- and 8-bit numbers in groups of 32 on a CPU, over packed copies.

torch multiplies rows in bfloat16 by 4-bit numbers (`_weight_int4pack_mm_for_cpu`), whose scales and
minimums it takes in bfloat16; sums are float32, results bfloat16. It needs no instructions for
bfloat16, and in float32 or float16 it would be a hundred times slower. An 8-bit number is two of 4
bits: 16 * high + low. Its work grows with the rows, so that many rows are multiplied by a copy in
16 bits where the format asks for one (`GroupedInts.wide`). Shape legend: T rows, O outputs, I
inputs, G groups of a row.
"""

import torch
from torch import Tensor

from core.devices.cpu import cpu_linear
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import GROUP, GroupedInts
from core.ops.grouped_ints import dequantize

OUTPUTS = 16  # the kernel takes multiples of so many
# Up to so many rows the kernel is faster than a copy of the matrix in that dtype (AMD EPYC with
# AVX512_BF16, SmolLM2's layers; float16 multiplies float32 rows).
FEW_ROWS = {torch.bfloat16: 8, torch.float16: 16}


def packed_linear(weight: GroupedInts, bias_O: Tensor | None) -> LinearKernel:
    """The layer on a CPU, over packed copies; does not keep `weight`. Rows may be of any dtype,
    which results have too. Their error is that of rows, scales and results in bfloat16."""
    few = _few_rows_linear(weight, bias_O)
    if weight.wide is None:
        return few
    many, most_rows = _many_rows_linear(weight, weight.wide, bias_O), FEW_ROWS[weight.wide]
    if many is None:
        return few
    return lambda x_TI: few(x_TI) if x_TI.shape[0] <= most_rows else many(x_TI)


def _many_rows_linear(
    weight: GroupedInts, dtype: torch.dtype, bias_O: Tensor | None
) -> LinearKernel | None:
    """Over a copy in `dtype`; None where this machine's torch is no faster with one."""
    weight_OI = dequantize(weight, torch.float32)
    if dtype is torch.float16 and cpu_linear.holds_halves(weight_OI):
        return cpu_linear.half_linear(weight_OI, bias_O)
    if dtype is torch.bfloat16 and cpu_linear.packs(dtype):
        return cpu_linear.packed_linear(weight_OI.to(dtype), bias_O)
    return None


def _few_rows_linear(weight: GroupedInts, bias_O: Tensor | None) -> LinearKernel:
    packed, scales_and_zeros = _packed(weight)
    num_parts = weight.bits // 4
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def run(x_TI: Tensor) -> Tensor:
        rows = x_TI.to(torch.bfloat16)
        if num_parts == 2:
            rows = torch.cat((rows, rows), 1)
        result_TO: Tensor = multiply(rows, packed, GROUP, scales_and_zeros).to(x_TI.dtype)
        return result_TO if bias_O is None else result_TO.add_(bias_O)

    return run


def _packed(weight: GroupedInts) -> tuple[Tensor, Tensor]:
    """What the kernel reads: value = (stored - 8) * scale + zero."""
    values_OI, scales_OG, minimums_OG = weight.values_OI, weight.scales_OG, weight.minimums_OG
    if weight.bits == 8:
        values_OI = torch.cat((values_OI >> 4, values_OI & 15), 1)
        minimums_OG = torch.cat((minimums_OG, torch.zeros_like(minimums_OG)), 1)
        scales_OG = torch.cat((scales_OG * 16, scales_OG), 1)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
    # The middle of a group's range is near 0, so that little is lost where it is rounded.
    zeros_OG = minimums_OG + scales_OG * 8
    scales_and_zeros = torch.stack((scales_OG.t(), zeros_OG.t()), 2).to(torch.bfloat16)
    return pack(values_OI.to(torch.int32), 1), scales_and_zeros.contiguous()
