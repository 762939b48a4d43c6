"""Rows as float8 for their way, by the fastest means there are on their device."""

from torch import Tensor

from core.kernels import block_fp8


def quantize_rows(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(T, E) -> float8_e4m3fn (T, E) and a float32 scale for every 128 columns."""
    if x_TE.device.type == "cuda":
        from core.kernels import triton_fp8

        return triton_fp8.quantize_rows(x_TE.contiguous())
    return block_fp8.quantize_rows(x_TE)
