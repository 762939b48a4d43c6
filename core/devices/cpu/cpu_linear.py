"""Matrix products on a CPU over weights in oneDNN's own layout, and over weights in float16 of
float32 rows (FBGEMM). Knows nothing of layers.

Shape legend: T rows, O outputs, I inputs.
"""

import torch
from torch import Tensor

from core.interfaces.ops import LinearKernel

# Rows oneDNN lays a packed weight out for. Layouts for 16 to 2048 rows were the same in effect,
# and the one for 1 row is slower from 128 rows on (Xeon with AMX).
_PACKED_FOR_ROWS = 16
_LARGEST_HALF = torch.finfo(torch.float16).max


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes this dtype on this machine, so that packing pays.

    Not for float32: there packing is slower at 1 row and equal from 128 rows on. It says nothing
    of speed: what has no instructions of its own is converted (core.devices.native_dtypes).
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def padded_rows(num_rows: int) -> int:
    """The number of rows that is multiplied for `num_rows`: powers of two up to 16, then steps of
    at most an eighth.

    oneDNN compiles and keeps code for every number of rows it meets (1,000 of them took 700 MB
    and never came back); of these there are few.
    """
    if num_rows <= 16:
        return 1 << (num_rows - 1).bit_length() if num_rows else 0
    step = max(16, 1 << (num_rows.bit_length() - 4))
    return -(-num_rows // step) * step


def pack(weight_OI: Tensor) -> Tensor:
    """A copy of the weight in oneDNN's layout; `to_dense` of it is the weight.

    F.linear reorders the weight at every call instead: 130 us against 60 us for 3072 x 576 at
    1 to 4 rows.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _PACKED_FOR_ROWS)
    return packed


def packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> LinearKernel:
    """The layer over a packed copy of the weight; does not keep `weight_OI`."""
    packed = pack(weight_OI)
    return lambda x_TI: multiply_packed(x_TI, packed, bias_O)


def multiply_packed(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ W.T + b at one of few different numbers of rows."""
    multiply = torch.ops.mkldnn._linear_pointwise.default
    num_rows = x_TI.shape[0]
    num_padded = padded_rows(num_rows)
    if num_padded != num_rows:
        wide_TI = x_TI.new_empty(num_padded, x_TI.shape[1])
        wide_TI[:num_rows] = x_TI
        wide_TO: Tensor = multiply(wide_TI, packed, bias_O, "none", [], "")
        return wide_TO[:num_rows]
    result_TO: Tensor = multiply(x_TI, packed, bias_O, "none", [], "")
    return result_TO


def holds_halves(weight_OI: Tensor) -> bool:
    """Whether `half_linear` can take this weight: torch has FBGEMM on x86 only, and float16 ends at
    65,504."""
    if "fbgemm" not in torch.backends.quantized.supported_engines or weight_OI.is_meta:
        return False
    return bool(torch.linalg.vector_norm(weight_OI, torch.inf) <= _LARGEST_HALF)


def half_linear(weight_OI: Tensor, bias_O: Tensor | None) -> LinearKernel:
    """The layer over a copy of the weight in float16, for rows of any dtype, which results have
    too. Rows and sums are float32, so that only the weight is rounded: by 2**-11 of a value, or
    3e-8 where that is more.

    At 1 row it reads half of the bytes that float32 has; at 128 it is as fast as oneDNN's float32
    and on an AMD EPYC 2.4 times as fast as MKL's, which F.linear calls.
    """
    bias = None if bias_O is None else bias_O.float()
    packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.detach().float(), bias)
    num_outputs = weight_OI.shape[0]
    multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def run(x_TI: Tensor) -> Tensor:
        if x_TI.shape[0] == 0:
            return x_TI.new_empty((0, num_outputs))
        result_TO: Tensor = multiply(x_TI.float(), packed).to(x_TI.dtype)
        return result_TO

    return run
