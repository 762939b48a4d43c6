"""The operations of latent attention as Triton kernels, one launch each.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.ops.torch_latent. Shape legend: see core.interfaces.ops; F is R/2, B pages of P
tokens, Z values of a cached vector.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.interfaces.latent_attention import LatentTransform

_BLOCK_HEADS = 32  # of one program


@triton.jit
def _rotate_pairs(
    x_ptr, out_ptr, cos_F, sin_F, head_stride, num_heads, half,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    heads_H = tl.arange(0, BLOCK_H)
    columns_F = tl.arange(0, BLOCK_F)
    columns_R = tl.arange(0, 2 * BLOCK_F)
    inside_HF = (heads_H[:, None] < num_heads) & (columns_F[None, :] < half)
    inside_HR = (heads_H[:, None] < num_heads) & (columns_R[None, :] < 2 * half)
    # Whole vectors are read and pairs parted in registers: one by one, loads would be of two bytes.
    places_HR = x_ptr + heads_H[:, None] * head_stride + columns_R[None, :]
    pairs_HR = tl.load(places_HR, mask=inside_HR, other=0.0).to(tl.float32)
    even_HF, odd_HF = tl.split(tl.reshape(pairs_HR, (BLOCK_H, BLOCK_F, 2)))
    # In place a pair's results go where other threads' pairs came from: all must have been read.
    tl.debug_barrier()
    first_HF = even_HF * cos_F[None, :] - odd_HF * sin_F[None, :]
    second_HF = odd_HF * cos_F[None, :] + even_HF * sin_F[None, :]
    places_HF = out_ptr + heads_H[:, None] * head_stride + columns_F[None, :]
    tl.store(places_HF, first_HF.to(out_ptr.dtype.element_ty), mask=inside_HF)
    tl.store(places_HF + half, second_HF.to(out_ptr.dtype.element_ty), mask=inside_HF)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def rope_interleaved_kernel(
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
    """Rotate the pairs of every query and key head of one row, in place, into halves."""
    row = tl.program_id(0).to(tl.int64)
    columns_F = tl.arange(0, BLOCK_F)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + row) * (2 * half)
    inside_F = columns_F < half
    cos_F = tl.load(angles_ptr + columns_F, mask=inside_F, other=0.0)
    sin_F = tl.load(angles_ptr + half + columns_F, mask=inside_F, other=0.0)
    q_ptr += row * q_stride
    k_ptr += row * k_stride
    _rotate_pairs(q_ptr, q_ptr, cos_F, sin_F, q_head_stride, num_heads, half, BLOCK_H, BLOCK_F)
    _rotate_pairs(k_ptr, k_ptr, cos_F, sin_F, k_head_stride, num_kv_heads, half, BLOCK_G, BLOCK_F)


@triton.jit
def _rotate(
    x_ptr, out_ptr, angles_ptr, head_stride, first_head, end_head,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Some heads of one row, into halves: of neighbouring pairs, or of halves. May be in place."""
    columns_F = tl.arange(0, BLOCK_F)
    inside_F = columns_F < HALF
    cos_F = tl.load(angles_ptr + columns_F, mask=inside_F, other=0.0)
    sin_F = tl.load(angles_ptr + HALF + columns_F, mask=inside_F, other=0.0)
    if INTERLEAVED:
        x_ptr += first_head * head_stride
        out_ptr += first_head * head_stride
        num_heads = end_head - first_head
        _rotate_pairs(x_ptr, out_ptr, cos_F, sin_F, head_stride, num_heads, HALF, BLOCK_H, BLOCK_F)
    else:
        heads_H = first_head + tl.arange(0, BLOCK_H)
        inside_HF = (heads_H < end_head)[:, None] & inside_F[None, :]
        places_HF = heads_H[:, None] * head_stride + columns_F[None, :]
        first_HF = tl.load(x_ptr + places_HF, mask=inside_HF, other=0.0).to(tl.float32)
        second_HF = tl.load(x_ptr + places_HF + HALF, mask=inside_HF, other=0.0).to(tl.float32)
        new_first_HF = first_HF * cos_F[None, :] - second_HF * sin_F[None, :]
        new_second_HF = second_HF * cos_F[None, :] + first_HF * sin_F[None, :]
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + places_HF, new_first_HF.to(dtype), mask=inside_HF)
        tl.store(out_ptr + places_HF + HALF, new_second_HF.to(dtype), mask=inside_HF)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def prepare_latent_kernel(
    q_ptr,
    cached_ptr,
    norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    cache_ptr,
    slots_ptr,
    q_stride,
    q_head_stride,
    cached_stride,
    EPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What is cached of one row, or the rotary parts of some of its query heads, in place; nothing
    for a row whose slot is negative."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns_C = tl.arange(0, BLOCK_C)
    inside_C = columns_C < LATENT_DIM
    norm_C = tl.load(norm_ptr + columns_C, mask=inside_C, other=0.0).to(tl.float32)
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)  # beside that of the slot: padding has one too
    if slot < 0:
        return
    angles_ptr = cos_sin_ptr + position * (2 * HALF)
    if block == 0:
        cached_ptr += row * cached_stride
        cache_ptr += slot * (LATENT_DIM + 2 * HALF)
        latent_C = tl.load(cached_ptr + columns_C, mask=inside_C, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(latent_C * latent_C, axis=0) / LATENT_DIM + EPS)
        latent_C = (latent_C * scale * norm_C).to(cache_ptr.dtype.element_ty)
        tl.store(cache_ptr + columns_C, latent_C, mask=inside_C)
        _rotate(
            cached_ptr + LATENT_DIM, cache_ptr + LATENT_DIM, angles_ptr, 0, 0, 1,
            HALF, INTERLEAVED, 1, BLOCK_F,
        )  # fmt: skip
    else:
        q_ptr += row * q_stride
        first_head = (block - 1) * BLOCK_H
        end_head = tl.minimum(first_head + BLOCK_H, NUM_HEADS)
        _rotate(
            q_ptr, q_ptr, angles_ptr, q_head_stride, first_head, end_head,
            HALF, INTERLEAVED, BLOCK_H, BLOCK_F,
        )  # fmt: skip


class TritonLatentOps:
    """The part of core.interfaces.ops.Ops that latent attention needs, as Triton kernels."""

    def rope_interleaved(
        self, q_THR: Tensor, k_TGR: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrites q and k, whose heads must be contiguous."""
        assert q_THR.stride(2) == 1
        assert k_TGR.stride(2) == 1
        num_rows, num_heads, rope_dim = q_THR.shape
        if num_rows == 0:
            return q_THR, k_TGR
        num_kv_heads = k_TGR.shape[1]
        rope_interleaved_kernel[(num_rows,)](
            q_THR,
            k_TGR,
            cos_sin_CR,
            positions_T,
            q_THR.stride(0),
            q_THR.stride(1),
            k_TGR.stride(0),
            k_TGR.stride(1),
            num_heads,
            num_kv_heads,
            rope_dim // 2,
            BLOCK_H=triton.next_power_of_2(num_heads),
            BLOCK_G=triton.next_power_of_2(num_kv_heads),
            BLOCK_F=triton.next_power_of_2(rope_dim // 2),
            num_warps=4,
        )
        return q_THR, k_TGR

    def prepare_latent(
        self,
        q_THR: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        cache_BPZ: Tensor,
        slots_T: Tensor,
    ) -> Tensor:
        """Overwrites q. Vectors of q and rows must be contiguous, as the whole cache."""
        assert q_THR.stride(2) == cached_TZ.stride(1) == 1
        assert cache_BPZ.is_contiguous()
        _, num_heads, rope_dim = q_THR.shape
        num_rows = slots_T.shape[0]
        if num_rows == 0:
            return q_THR
        latent_dim = cached_TZ.shape[1] - rope_dim
        prepare_latent_kernel[(num_rows, 1 + triton.cdiv(num_heads, _BLOCK_HEADS))](
            q_THR,
            cached_TZ,
            transform.norm_C,
            transform.cos_sin_CR,
            positions_T,
            cache_BPZ,
            slots_T,
            q_THR.stride(0),
            q_THR.stride(1),
            cached_TZ.stride(0),
            EPS=transform.eps,
            INTERLEAVED=transform.interleaved,
            NUM_HEADS=num_heads,
            LATENT_DIM=latent_dim,
            HALF=rope_dim // 2,
            BLOCK_H=_BLOCK_HEADS,
            BLOCK_C=triton.next_power_of_2(latent_dim),
            BLOCK_F=triton.next_power_of_2(rope_dim // 2),
            num_warps=4,
            **options(q_THR.device),
        )
        return q_THR
