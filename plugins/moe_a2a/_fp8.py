"""Rows as float8 for their way, by the fastest means there are on their device."""

from torch import Tensor

from core.kernels import block_fp8


def quantize_rows(x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(T, E) -> float8_e4m3fn (T, E) and a float32 scale for every 128 columns; of the rows
    `source_T` where it is given."""
    if x_TE.device.type == "cuda":
        from core.kernels import triton_fp8

        return triton_fp8.quantize_rows(x_TE.contiguous(), source_T)
    return block_fp8.quantize_rows(x_TE if source_T is None else x_TE[source_T])
