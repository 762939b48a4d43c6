"""Launches the Gluon kernel of absorbed latent attention, where `fits` says that it can run.

Imported only where a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: see
core.interfaces.latent_attention.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.gpu_tools.dependent_launch import options
from core.interfaces.latent_attention import LatentAttentionSpec
from plugins.attention._triton_latent.gluon_kernels import (
    HEADS,
    LATENT_DIM,
    ROPE_DIM,
    SHARED,
    TOKENS,
    latent_decode_kernel,
)
from plugins.attention._triton_latent.splits import Splits

_ALIGNMENT = 16  # bytes, of addresses and strides


def fits(spec: LatentAttentionSpec) -> bool:
    """Whether the kernel takes such steps, on a Hopper GPU."""
    return (
        spec.dtype is torch.bfloat16
        and (spec.latent_dim, spec.rope_dim) == (LATENT_DIM, ROPE_DIM)
        and spec.num_heads % HEADS == 0
        and spec.page_size % TOKENS == 0
    )


class GluonKernel:
    """plugins.attention._triton_latent.splits.SplitKernel in Gluon."""

    heads, tokens = HEADS, TOKENS

    def __init__(self, spec: LatentAttentionSpec, scale_log2: float) -> None:
        self._head_blocks = spec.num_heads // HEADS
        self._constants: dict[str, Any] = dict(
            SCALE_LOG2=scale_log2,
            PAGE_SIZE=spec.page_size,
            NUM_HEADS=spec.num_heads,
            num_warps=8,
            **options(spec.device),
        )

    def attend(self, work: Splits) -> None:
        """Every program's split."""
        batch = work.batch
        cached_YZ = work.cache_BPZ.view(-1, LATENT_DIM + ROPE_DIM)
        q_latents_XC = work.q_THC.view(-1, LATENT_DIM)
        latent_decode_kernel[(work.num_programs * self._head_blocks,)](
            TensorDescriptor.from_tensor(q_latents_XC, [HEADS, LATENT_DIM], SHARED),
            TensorDescriptor.from_tensor(_matrix(work.q_THR), [HEADS, ROPE_DIM], SHARED),
            TensorDescriptor.from_tensor(cached_YZ, [TOKENS, LATENT_DIM], SHARED),
            TensorDescriptor.from_tensor(cached_YZ, [TOKENS, ROPE_DIM], SHARED),
            work.out_THC,
            work.workspace,
            work.schedule_RX,
            batch.context_lens_S,
            batch.page_table_SM,
            batch.page_table_SM.stride(0),
            **self._constants,
        )


def _matrix(q_THR: Tensor) -> Tensor:
    """Rows that the tensor memory accelerator can copy; a copy where they lie otherwise."""
    q_XR = q_THR.flatten(0, 1)
    aligned = q_XR.data_ptr() % _ALIGNMENT == 0
    return q_XR if aligned and q_XR.stride(0) * 2 % _ALIGNMENT == 0 else q_XR.contiguous()
