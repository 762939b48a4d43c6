"""Launches the Triton kernel of absorbed latent attention: any dtype, dimensions and page size.

Shape legend: see core.interfaces.latent_attention.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.gpu_tools.dependent_launch import options
from core.interfaces.latent_attention import LatentAttentionSpec
from plugins.attention._triton_heads.device import TritonDevice, describe
from plugins.attention._triton_latent.decode_kernels import latent_decode_kernel
from plugins.attention._triton_latent.splits import Splits


class PortableKernel:
    """plugins.attention._triton_latent.splits.SplitKernel in Triton."""

    def __init__(self, spec: LatentAttentionSpec, scale_log2: float) -> None:
        self._spec = spec
        device = describe(spec.device)
        # The tensor cores take no float32 without losing bits, and the interpreter's dot no bf16.
        self._wide = device.interpreted or spec.dtype is torch.float32
        self.heads, self.tokens = _tiles(spec, self._wide, device)
        self._use_blocks = _lie_in_blocks(spec, self.tokens)
        self._constants: dict[str, Any] = dict(
            SCALE_LOG2=scale_log2,
            WIDE=self._wide,
            BLOCKS=self._use_blocks,
            PAGE_SIZE=spec.page_size,
            NUM_HEADS=spec.num_heads,
            LATENT_DIM=spec.latent_dim,
            ROPE_DIM=spec.rope_dim,
            BLOCK_M=self.heads,
            BLOCK_N=self.tokens,
            BLOCK_C=block_of(spec.latent_dim),
            BLOCK_R=block_of(spec.rope_dim),
            num_warps=4 if self._wide else 8,
            num_stages=1 if self._wide else 2,
            **options(spec.device),
        )

    def attend(self, work: Splits) -> None:
        """Every program's split."""
        batch, q_THR = work.batch, work.q_THR
        latent_blocks, rope_blocks = self._blocks(work.cache_BPZ)
        head_blocks = triton.cdiv(self._spec.num_heads, self.heads)
        latent_decode_kernel[(work.num_programs * head_blocks,)](
            work.q_THC,
            q_THR,
            q_THR.stride(0),
            q_THR.stride(1),
            work.cache_BPZ,
            latent_blocks,
            rope_blocks,
            work.out_THC,
            work.workspace,
            work.schedule_RX,
            batch.context_lens_S,
            batch.page_table_SM,
            batch.page_table_SM.stride(0),
            **self._constants,
        )

    def _blocks(self, cache_BPZ: Tensor) -> tuple[Any, Any]:
        """Descriptors of a tile of latents and of rotary parts."""
        if not self._use_blocks:
            return None, None
        spec = self._spec
        slots_YZ = cache_BPZ.view(-1, spec.latent_dim + spec.rope_dim)
        return (
            TensorDescriptor.from_tensor(slots_YZ, [self.tokens, spec.latent_dim]),
            TensorDescriptor.from_tensor(slots_YZ, [self.tokens, spec.rope_dim]),
        )


def block_of(dim: int) -> int:
    """The tile of a dimension: a power of two that tl.dot takes."""
    return max(16, int(triton.next_power_of_2(dim)))


def _tiles(spec: LatentAttentionSpec, wide: bool, device: TritonDevice) -> tuple[int, int]:
    """(heads of a program, tokens of a tile). float32 products run without tensor cores, from
    registers: small tiles."""
    if wide:
        return 16, 16
    heads, tokens = min(64, block_of(spec.num_heads)), 64
    vector_bytes = 2 * (block_of(spec.latent_dim) + block_of(spec.rope_dim))
    while tokens > 16 and (heads + 2 * tokens) * vector_bytes > device.shared_bytes - 4096:
        tokens //= 2
    return heads, tokens


def _lie_in_blocks(spec: LatentAttentionSpec, tokens: int) -> bool:
    """Whether a tile of tokens lies in one page, and its dimensions are tiles without padding."""
    exact = all(block_of(dim) == dim for dim in (spec.latent_dim, spec.rope_dim))
    return exact and spec.page_size % tokens == 0 and spec.latent_dim % spec.rope_dim == 0
