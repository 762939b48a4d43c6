"""Random paged steps of latent attention and their answers in plain float64.

Knows nothing of backends. Shape legend: see core.interfaces.latent_attention.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one step; `cached` counts the tokens before the new rows of each sequence."""

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    page_size: int = 16
    num_heads: int = 3
    dims: tuple[int, int, int, int] = (16, 8, 16, 32)  # N, R, V, C
    seed: int = 0

    def __str__(self) -> str:
        pairs = list(zip(self.cached, self.rows, strict=True))[:4]
        lengths = "+".join(f"{c}:{r}" for c, r in pairs)
        dims = "-".join(str(dim) for dim in self.dims)
        return f"p{self.page_size}-h{self.num_heads}-d{dims}-{lengths}-s{self.seed}"


@dataclass(frozen=True)
class Step:
    """What a backend is given, and both answers (float64, on the CPU)."""

    spec: LatentAttentionSpec
    batch: SequenceBatch
    cache_BPZ: Tensor
    q_THD: Tensor
    q_THZ: Tensor
    key_HNC: Tensor
    value_HVC: Tensor
    expected_THC: Tensor
    expected_THV: Tensor
    expanded_tokens: list[int] = field(default_factory=list)  # of each call of `expand`

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """(q_THC, q_THR) of the absorbed form; the rotary part lies in wider rows, as after its
        projection."""
        return split_queries(self.spec, self.q_THZ)

    def expand(self, cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of the cache, and strided, as a model's are."""
        self.expanded_tokens.append(cached_XZ.shape[0])
        return expand(cached_XZ, self.key_HNC, self.value_HVC)


def split_queries(spec: LatentAttentionSpec, q_THZ: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts, new tensors: latents contiguous, rotary parts behind as many others."""
    q_THC, q_THR = q_THZ.split((spec.latent_dim, spec.rope_dim), dim=2)
    wide_THX = torch.cat((q_THZ.new_full((*q_THZ.shape[:2], spec.nope_dim), torch.nan), q_THR), 2)
    return q_THC.contiguous(), wide_THX[..., spec.nope_dim :]


def expand(cached_XZ: Tensor, key_HNC: Tensor, value_HVC: Tensor) -> tuple[Tensor, Tensor]:
    """Non-rotary keys (X, H, N) and values (X, H, V)."""
    num_heads, nope_dim, rank = key_HNC.shape
    weight_OC = torch.cat((key_HNC, value_HVC), dim=1).flatten(0, 1)
    kv_XHY = (cached_XZ[:, :rank] @ weight_OC.T).unflatten(1, (num_heads, -1))
    return kv_XHY[..., :nope_dim], kv_XHY[..., nope_dim:]


def make_step(case: Case, dtype: torch.dtype, device: torch.device) -> Step:
    """A step over a pool whose pages are permuted and where all unused slots hold NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    nope_dim, rope_dim, value_dim, latent_dim = case.dims
    context_lens = [c + r for c, r in zip(case.cached, case.rows, strict=True)]
    page_counts = [-(-length // case.page_size) for length in context_lens]
    num_pages, num_rows = sum(page_counts) + 3, sum(case.rows)
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # never page 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    scale = (nope_dim + rope_dim) ** -0.5
    key_HNC = normal(case.num_heads, nope_dim, latent_dim) * latent_dim**-0.5
    value_HVC = normal(case.num_heads, value_dim, latent_dim) * latent_dim**-0.5
    # Heads lie in wider rows, as after a merged projection.
    q_THD = normal(num_rows, case.num_heads * (nope_dim + rope_dim) + 8)[:, 8:].unflatten(
        1, (case.num_heads, -1)
    )
    q_THZ = normal(num_rows, case.num_heads, latent_dim + rope_dim)
    cache_shape = (num_pages, case.page_size, latent_dim + rope_dim)
    cache_BPZ = torch.full(cache_shape, torch.nan, dtype=dtype)
    page_table_SM = torch.zeros(len(case.rows), max(page_counts) + 2, dtype=torch.int32)
    absorbed, expanded = [], []
    start = 0
    for index, (rows, length) in enumerate(zip(case.rows, context_lens, strict=True)):
        pages = [order.pop() for _ in range(page_counts[index])]
        page_table_SM[index, : len(pages)] = torch.tensor(pages)
        cached_XZ = normal(length, latent_dim + rope_dim)
        for token in range(length):
            cache_BPZ[pages[token // case.page_size], token % case.page_size] = cached_XZ[token]
        own = slice(start, start + rows)
        wide_XZ = cached_XZ.double()
        one_head = wide_XZ.unsqueeze(1).expand(-1, case.num_heads, -1)
        absorbed.append(attend(q_THZ[own], one_head, one_head[..., :latent_dim], scale))
        nope_XHN, values = expand(wide_XZ, key_HNC.double(), value_HVC.double())
        keys = torch.cat((nope_XHN, one_head[..., latent_dim:]), dim=2)
        expanded.append(attend(q_THD[own], keys, values, scale))
        start += rows
    spec = LatentAttentionSpec(
        num_heads=case.num_heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        latent_dim=latent_dim,
        scale=scale,
        page_size=case.page_size,
        dtype=dtype,
        device=device,
        max_context_tokens=max(context_lens) + 7,
    )
    starts = torch.tensor(list(accumulate(case.rows, initial=0)), dtype=torch.int32)
    batch = SequenceBatch(
        list(case.rows),
        context_lens,
        starts.to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        page_table_SM.to(device),
    )
    return Step(
        spec,
        batch,
        cache_BPZ.to(device),
        q_THD.to(device),
        q_THZ.to(device),
        key_HNC.to(device),
        value_HVC.to(device),
        torch.cat(absorbed),
        torch.cat(expanded),
    )


def attend(q_QHD: Tensor, k_XHD: Tensor, v_XHV: Tensor, scale: float) -> Tensor:
    """Attention of the last Q tokens of one sequence, one row at a time."""
    num_rows, num_tokens = q_QHD.shape[0], k_XHD.shape[0]
    out = []
    for row in range(num_rows):
        seen = num_tokens - num_rows + row + 1
        scores_HX = torch.einsum("hd,xhd->hx", q_QHD[row].double(), k_XHD[:seen]) * scale
        out.append(torch.einsum("hx,xhv->hv", scores_HX.softmax(1), v_XHV[:seen]))
    return torch.stack(out)
