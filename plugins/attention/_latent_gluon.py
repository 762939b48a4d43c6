"""Launches the Gluon kernel of absorbed latent attention, where `fits` says that it can run.

Imported only where a Hopper GPU is: Gluon kernels run in no interpreter. Makes no schedule and sums
no pieces. Shape legend: see core.interfaces.latent_attention.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionSpec
from plugins.attention._latent_gluon_kernels import (
    HEADS,
    LATENT_DIM,
    ROPE_DIM,
    SHARED,
    TOKENS,
    latent_decode_kernel,
)

_ALIGNMENT = 16  # bytes, of addresses and strides


def fits(spec: LatentAttentionSpec) -> bool:
    """Whether the kernel takes such steps, on a Hopper GPU."""
    return (
        spec.dtype is torch.bfloat16
        and (spec.latent_dim, spec.rope_dim) == (LATENT_DIM, ROPE_DIM)
        and spec.num_heads % HEADS == 0
        and spec.page_size % TOKENS == 0
    )


def attend(
    spec: LatentAttentionSpec,
    batch: SequenceBatch,
    schedule_RX: Tensor,
    workspace: Tensor,
    num_programs: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    scale_log2: float,
    launch: dict[str, Any],
) -> None:
    """Every program's stretch; `tensors` are both parts of queries, cache and output."""
    q_THC, q_THR, cache_BPZ, out_THC = tensors
    cached_YZ = cache_BPZ.view(-1, LATENT_DIM + ROPE_DIM)
    latent_decode_kernel[(num_programs * (spec.num_heads // HEADS),)](
        TensorDescriptor.from_tensor(q_THC.view(-1, LATENT_DIM), [HEADS, LATENT_DIM], SHARED),
        TensorDescriptor.from_tensor(_matrix(q_THR), [HEADS, ROPE_DIM], SHARED),
        TensorDescriptor.from_tensor(cached_YZ, [TOKENS, LATENT_DIM], SHARED),
        TensorDescriptor.from_tensor(cached_YZ, [TOKENS, ROPE_DIM], SHARED),
        out_THC,
        workspace,
        schedule_RX,
        batch.context_lens_S,
        batch.page_table_SM,
        batch.page_table_SM.stride(0),
        SCALE_LOG2=scale_log2,
        PAGE_SIZE=spec.page_size,
        NUM_HEADS=spec.num_heads,
        num_warps=8,
        **launch,
    )


def _matrix(q_THR: Tensor) -> Tensor:
    """Rows that the tensor memory accelerator can copy; a copy where they lie otherwise."""
    q_XR = q_THR.flatten(0, 1)
    aligned = q_XR.data_ptr() % _ALIGNMENT == 0
    return q_XR if aligned and q_XR.stride(0) * 2 % _ALIGNMENT == 0 else q_XR.contiguous()
