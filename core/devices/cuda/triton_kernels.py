"""Triton kernels of the operations of a layer. Launched by core.devices.cuda.triton_ops alone.

Every kernel loads in the tensors' dtype, computes in float32 and rounds when it stores. Rows may
lie apart (a row stride is passed); within a row elements are contiguous.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor


# The number of rows differs from step to step; each variant that is specialised on it (1, or a
# multiple of 16) would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """RMS norm of BLOCK_T rows; with ADD, of x + residual, which is stored in residual first."""
    rows_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns_E = tl.arange(0, BLOCK_E)
    inside_TE = (rows_T[:, None] < num_rows) & (columns_E[None, :] < SIZE)
    weight_E = tl.load(weight_ptr + columns_E, mask=columns_E < SIZE, other=0.0)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    x_TE = tl.load(
        x_ptr + rows_T[:, None] * x_stride + columns_E[None, :], mask=inside_TE, other=0.0
    ).to(tl.float32)
    if ADD:
        places_TE = residual_ptr + rows_T[:, None] * residual_stride + columns_E[None, :]
        x_TE += tl.load(places_TE, mask=inside_TE, other=0.0).to(tl.float32)
        # What is normalised is the rounded sum, as the next layer will see it.
        rounded_TE = x_TE.to(residual_ptr.dtype.element_ty)
        tl.store(places_TE, rounded_TE, mask=inside_TE)
        x_TE = rounded_TE.to(tl.float32)
    scale_T = tl.rsqrt(tl.sum(x_TE * x_TE, axis=1) / SIZE + EPS)
    out_TE = x_TE * scale_T[:, None] * weight_E.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows_T[:, None] * SIZE + columns_E[None, :],
        out_TE.to(out_ptr.dtype.element_ty),
        mask=inside_TE,
    )


@triton.jit
def _rotate_heads(
    x_ptr,
    cos_F,
    sin_F,
    head_stride,
    num_heads,
    half,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    heads_H = tl.arange(0, BLOCK_H)
    columns_F = tl.arange(0, BLOCK_F)
    inside_HF = (heads_H[:, None] < num_heads) & (columns_F[None, :] < half)
    places_HF = x_ptr + heads_H[:, None] * head_stride + columns_F[None, :]
    first_HF = tl.load(places_HF, mask=inside_HF, other=0.0).to(tl.float32)
    second_HF = tl.load(places_HF + half, mask=inside_HF, other=0.0).to(tl.float32)
    new_first_HF = first_HF * cos_F[None, :] - second_HF * sin_F[None, :]
    new_second_HF = second_HF * cos_F[None, :] + first_HF * sin_F[None, :]
    tl.store(places_HF, new_first_HF.to(x_ptr.dtype.element_ty), mask=inside_HF)
    tl.store(places_HF + half, new_second_HF.to(x_ptr.dtype.element_ty), mask=inside_HF)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_heads,
    num_kv_heads,
    half,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Rotate the first 2 * half values of every query and key head of one row, in place."""
    row = tl.program_id(0).to(tl.int64)
    columns_F = tl.arange(0, BLOCK_F)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + row) * (2 * half)
    inside_F = columns_F < half
    cos_F = tl.load(angles_ptr + columns_F, mask=inside_F, other=0.0)
    sin_F = tl.load(angles_ptr + half + columns_F, mask=inside_F, other=0.0)
    _rotate_heads(
        q_ptr + row * q_stride, cos_F, sin_F, q_head_stride, num_heads, half, BLOCK_H, BLOCK_F
    )
    _rotate_heads(
        k_ptr + row * k_stride, cos_F, sin_F, k_head_stride, num_kv_heads, half, BLOCK_G, BLOCK_F
    )


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    SIZE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One block of one row."""
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = columns_I < SIZE
    places_I = gate_up_ptr + row * gate_up_stride + columns_I
    gate_I = tl.load(places_I, mask=inside_I, other=0.0).to(tl.float32)
    up_I = tl.load(places_I + SIZE, mask=inside_I, other=0.0).to(tl.float32)
    out_I = gate_I / (1.0 + tl.exp(-gate_I)) * up_I
    tl.store(out_ptr + row * SIZE + columns_I, out_I.to(out_ptr.dtype.element_ty), mask=inside_I)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    size,
    BLOCK: tl.constexpr,
):
    """Copy the k and v of one row, all heads, to its token slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    k = tl.load(k_ptr + row * k_stride + columns, mask=inside)
    tl.store(k_cache_ptr + slot * size + columns, k, mask=inside)
    v = tl.load(v_ptr + row * v_stride + columns, mask=inside)
    tl.store(v_cache_ptr + slot * size + columns, v, mask=inside)
