"""One launch between the projection of heads and attention: norms, rotation, and the cache's rows.

Queries and keys are normalised where their model does, rotated by halves and written back in place;
keys and values are stored in a paged cache. Computes in float32 and rounds once. Knows nothing of
attention. Shape legend: see core.interfaces.ops; F heads of a row (H of queries, G of keys, G of
values), B heads of a block, U pairs of a head's values: D / 2, of which the first R / 2 turn.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.interfaces.attention import HeadTransform, LayerKV

_BLOCK_HEADS = 8  # of one program


@triton.jit
def _pairs(pairs_U, HALF: tl.constexpr, TURNED: tl.constexpr):
    """The column of the first value of each pair, and how far behind it the second is. What does
    not turn is paired by halves too."""
    if TURNED == HALF:
        return pairs_U, tl.full(pairs_U.shape, HALF, tl.int32)
    turns_U = pairs_U < TURNED
    return pairs_U + tl.where(turns_U, 0, TURNED), tl.where(turns_U, TURNED, HALF - TURNED)


@triton.jit
def _load_norm(q_norm_ptr, k_norm_ptr, is_q_B1, is_k_B1, columns_U, inside_U):
    """Weights of each head of a block; 1 for values."""
    q_U = tl.load(q_norm_ptr + columns_U, mask=inside_U, other=0.0).to(tl.float32)
    k_U = tl.load(k_norm_ptr + columns_U, mask=inside_U, other=0.0).to(tl.float32)
    return tl.where(is_q_B1, q_U[None, :], tl.where(is_k_B1, k_U[None, :], 1.0))


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def prepare_heads_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_B heads of one row; nothing for a row whose slot is negative."""
    row = tl.program_id(0).to(tl.int64)
    heads_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    pairs_U = tl.arange(0, BLOCK_U)
    inside_U = pairs_U < HALF
    columns_U, apart_U = _pairs(pairs_U, HALF, TURNED)
    apart_1U = apart_U[None, :]
    is_q_B1 = (heads_B < H)[:, None]
    is_v_B1 = (heads_B >= H + G)[:, None]
    is_k_B1 = (is_q_B1 | is_v_B1) == 0
    if NORM:
        first_norm_BU = _load_norm(q_norm_ptr, k_norm_ptr, is_q_B1, is_k_B1, columns_U, inside_U)
        second_norm_BU = _load_norm(
            q_norm_ptr, k_norm_ptr, is_q_B1, is_k_B1, columns_U + apart_U, inside_U
        )
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)  # beside that of the slot: padding has one too
    if slot < 0:
        return
    inside_BU = (heads_B[:, None] < H + 2 * G) & inside_U[None, :]
    places_BU = qkv_ptr + (row * (H + 2 * G) + heads_B[:, None]) * (2 * HALF) + columns_U[None, :]
    first_BU = tl.load(places_BU, mask=inside_BU, other=0.0).to(tl.float32)
    second_BU = tl.load(places_BU + apart_1U, mask=inside_BU, other=0.0).to(tl.float32)
    angles_ptr = cos_sin_ptr + position * (2 * TURNED) + pairs_U
    cos_U = tl.load(angles_ptr, mask=pairs_U < TURNED, other=1.0)
    sin_U = tl.load(angles_ptr + TURNED, mask=pairs_U < TURNED, other=0.0)
    if NORM:
        squares_B = tl.sum(first_BU * first_BU + second_BU * second_BU, axis=1)
        scale_B1 = tl.rsqrt(squares_B / (2 * HALF) + EPS)[:, None]
        scale_B1 = tl.where(is_v_B1, 1.0, scale_B1)
        first_BU = first_BU * scale_B1 * first_norm_BU
        second_BU = second_BU * scale_B1 * second_norm_BU
    cos_BU = tl.where(is_v_B1, 1.0, cos_U[None, :])
    sin_BU = tl.where(is_v_B1, 0.0, sin_U[None, :])
    dtype = qkv_ptr.dtype.element_ty
    new_first_BU = (first_BU * cos_BU - second_BU * sin_BU).to(dtype)
    new_second_BU = (second_BU * cos_BU + first_BU * sin_BU).to(dtype)
    turned_BU = inside_BU & (is_v_B1 == 0)
    tl.store(places_BU, new_first_BU, mask=turned_BU)
    tl.store(places_BU + apart_1U, new_second_BU, mask=turned_BU)
    k_places_BU = (slot * G + heads_B[:, None] - H) * (2 * HALF) + columns_U[None, :]
    tl.store(k_cache_ptr + k_places_BU, new_first_BU, mask=inside_BU & is_k_B1)
    tl.store(k_cache_ptr + k_places_BU + apart_1U, new_second_BU, mask=inside_BU & is_k_B1)
    v_places_BU = k_places_BU - G * 2 * HALF
    tl.store(v_cache_ptr + v_places_BU, new_first_BU, mask=inside_BU & is_v_B1)
    tl.store(v_cache_ptr + v_places_BU + apart_1U, new_second_BU, mask=inside_BU & is_v_B1)


class TritonHeadOps:
    """The part of TritonOps that lies between the projection of heads and attention."""

    def prepare_heads(
        self,
        qkv_TFD: Tensor,
        heads: HeadTransform,
        positions_T: Tensor,
        cache: LayerKV,
        slots_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Overwrites the real rows of `qkv_TFD`; views of it are returned."""
        assert qkv_TFD.is_contiguous()
        assert cache.k_NPGD.is_contiguous()
        assert cache.v_NPGD.is_contiguous()
        num_kv_heads = heads.num_kv_heads
        num_heads = qkv_TFD.shape[1] - 2 * num_kv_heads
        half = qkv_TFD.shape[2] // 2
        normed = heads.q_norm_D is not None and heads.k_norm_D is not None
        num_rows = slots_T.shape[0]
        if num_rows:
            prepare_heads_kernel[(num_rows, triton.cdiv(qkv_TFD.shape[1], _BLOCK_HEADS))](
                qkv_TFD,
                heads.q_norm_D if normed else heads.cos_sin_CR,
                heads.k_norm_D if normed else heads.cos_sin_CR,
                heads.cos_sin_CR,
                positions_T,
                slots_T,
                cache.k_NPGD,
                cache.v_NPGD,
                EPS=heads.eps,
                NORM=normed,
                H=num_heads,
                G=num_kv_heads,
                HALF=half,
                TURNED=heads.cos_sin_CR.shape[1] // 2,
                BLOCK_B=_BLOCK_HEADS,
                BLOCK_U=triton.next_power_of_2(half),
                num_warps=2,
                **options(qkv_TFD.device),
            )
        q_THD, k_TGD, v_TGD = qkv_TFD.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
        return q_THD, k_TGD, v_TGD
