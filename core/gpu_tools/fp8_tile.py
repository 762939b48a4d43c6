"""Rows as float8 inside a Triton kernel: what kernels of layers and of exchanges share."""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def quantize_tile(x_TI):
    """(fp8 values, float32 scales) of 128 columns of some rows."""
    wide_TI = x_TI.to(tl.float32)
    largest_T = tl.max(tl.abs(wide_TI), axis=1)
    scale_T = tl.where(largest_T > 0.0, largest_T / 448.0, 1.0)
    return (wide_TI / scale_T[:, None]).to(tl.float8e4nv), scale_T
