"""The operations of latent attention as Triton kernels, one launch each.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.kernels.torch_latent. Shape legend: see core.interfaces.ops; F is R/2, B pages of P
tokens, Z values of a cached vector.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_pairs(
    x_ptr, cos_F, sin_F, head_stride, num_heads, half, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr
):
    heads_H = tl.arange(0, BLOCK_H)
    columns_F = tl.arange(0, BLOCK_F)
    inside_HF = (heads_H[:, None] < num_heads) & (columns_F[None, :] < half)
    heads_ptr_H1 = x_ptr + heads_H[:, None] * head_stride
    pairs_HF = heads_ptr_H1 + 2 * columns_F[None, :]
    even_HF = tl.load(pairs_HF, mask=inside_HF, other=0.0).to(tl.float32)
    odd_HF = tl.load(pairs_HF + 1, mask=inside_HF, other=0.0).to(tl.float32)
    # A pair's results go where other threads' pairs came from: all must have been read.
    tl.debug_barrier()
    first_HF = even_HF * cos_F[None, :] - odd_HF * sin_F[None, :]
    second_HF = odd_HF * cos_F[None, :] + even_HF * sin_F[None, :]
    places_HF = heads_ptr_H1 + columns_F[None, :]
    tl.store(places_HF, first_HF.to(x_ptr.dtype.element_ty), mask=inside_HF)
    tl.store(places_HF + half, second_HF.to(x_ptr.dtype.element_ty), mask=inside_HF)


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
    _rotate_pairs(
        q_ptr + row * q_stride, cos_F, sin_F, q_head_stride, num_heads, half, BLOCK_H, BLOCK_F
    )
    _rotate_pairs(
        k_ptr + row * k_stride, cos_F, sin_F, k_head_stride, num_kv_heads, half, BLOCK_G, BLOCK_F
    )


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def write_latent_kernel(
    cached_ptr, cache_ptr, slots_ptr, cached_stride, size, BLOCK_Z: tl.constexpr
):
    """Copy one row to its token slot; a row of padding has none."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    columns_Z = tl.arange(0, BLOCK_Z)
    inside_Z = columns_Z < size
    values_Z = tl.load(cached_ptr + row * cached_stride + columns_Z, mask=inside_Z)
    tl.store(cache_ptr + slot * size + columns_Z, values_Z, mask=inside_Z)


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

    def write_latent(self, cached_TZ: Tensor, cache_BPZ: Tensor, slots_T: Tensor) -> None:
        """Store rows by token slot; the cache must be contiguous and of the rows' dtype."""
        assert cache_BPZ.is_contiguous()
        assert cached_TZ.stride(1) == 1
        num_rows, size = cached_TZ.shape
        if num_rows == 0:
            return
        write_latent_kernel[(num_rows,)](
            cached_TZ,
            cache_BPZ,
            slots_T,
            cached_TZ.stride(0),
            size,
            BLOCK_Z=triton.next_power_of_2(size),
            num_warps=2,
        )
