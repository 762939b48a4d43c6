"""Random paged steps and their attention in plain float64, for the attention contract.

Knows nothing of backends. Shape legend: see core.interfaces.attention.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from core.interfaces.attention import AttentionSpec, LayerKV, NewKV, SequenceBatch


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one step; `cached` counts the tokens before the new rows of each sequence."""

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    page_size: int = 16
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 16
    seed: int = 0

    def __str__(self) -> str:
        lengths = "+".join(
            f"{c}:{r}" for c, r in list(zip(self.cached, self.rows, strict=True))[:4]
        )
        return (
            f"p{self.page_size}-h{self.num_heads}/{self.num_kv_heads}-d{self.head_dim}-"
            f"{lengths}-s{self.seed}"
        )


@dataclass(frozen=True)
class Step:
    """What a backend is given, and the answer."""

    spec: AttentionSpec
    batch: SequenceBatch
    kv: LayerKV
    new: NewKV
    q_THD: Tensor
    expected_THD: Tensor  # float64, on the CPU


def make_step(case: Case, dtype: torch.dtype, device: torch.device) -> Step:
    """A step over a pool whose pages are permuted and where all unused slots hold NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    context_lens = [c + r for c, r in zip(case.cached, case.rows, strict=True)]
    page_counts = [-(-length // case.page_size) for length in context_lens]
    num_pages = sum(page_counts) + 3
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # never page 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kv_shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    k_NPGD, v_NPGD = (torch.full(kv_shape, torch.nan, dtype=dtype) for _ in range(2))
    new = []
    page_table_SM = torch.zeros(len(case.rows), max(page_counts) + 2, dtype=torch.int32)
    q_THD = normal(sum(case.rows), case.num_heads, case.head_dim)
    expected = []
    start = 0
    for index, (rows, length) in enumerate(zip(case.rows, context_lens, strict=True)):
        pages = [order.pop() for _ in range(page_counts[index])]
        page_table_SM[index, : len(pages)] = torch.tensor(pages)
        k_CGD, v_CGD = (normal(length, case.num_kv_heads, case.head_dim) for _ in range(2))
        for token in range(length):
            place = pages[token // case.page_size], token % case.page_size
            k_NPGD[place], v_NPGD[place] = k_CGD[token], v_CGD[token]
        new.append((k_CGD[length - rows :], v_CGD[length - rows :]))
        expected.append(attend(q_THD[start : start + rows], k_CGD, v_CGD))
        start += rows
    starts = list(accumulate(case.rows, initial=0))
    spec = AttentionSpec(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        page_size=case.page_size,
        dtype=dtype,
        device=device,
        max_context_tokens=max(context_lens) + 7,
    )
    batch = SequenceBatch(
        list(case.rows),
        context_lens,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        page_table_SM.to(device),
    )
    kv = LayerKV(k_NPGD.to(device), v_NPGD.to(device))
    k_TGD, v_TGD = (torch.cat(part).to(device) for part in zip(*new, strict=True))
    return Step(spec, batch, kv, NewKV(k_TGD, v_TGD), q_THD.to(device), torch.cat(expected))


def as_captured(step: Step, num_sequences: int, num_rows: int, num_tokens: int) -> Step:
    """The same step as a CUDA graph sees it that was captured for bounds which it does not reach:
    more sequences, which are padding, more rows (0: of decodes alone), longer contexts."""
    batch, old = step.batch, len(step.batch.query_lens)
    device = batch.query_starts_S1.device
    more = num_sequences - old
    decodes = num_rows == 0
    num_rows = num_sequences if decodes else num_rows
    last = batch.query_starts_S1[-1:].expand(more)
    pages = batch.page_table_SM
    columns = -(-num_tokens // step.spec.page_size) - pages.shape[1]
    table_SM = torch.nn.functional.pad(pages, (0, max(columns, 0), 0, more))
    captured = SequenceBatch(
        [1] * num_sequences if decodes else [num_rows // num_sequences + 1] * num_sequences,
        [num_tokens] * num_sequences,
        torch.cat((batch.query_starts_S1, last)),
        torch.cat((batch.context_lens_S, torch.zeros(more, dtype=torch.int32, device=device))),
        table_SM,
    )
    rows = num_rows - step.q_THD.shape[0]

    def padded(x: Tensor) -> Tensor:
        return torch.cat((x, x[:1].expand(rows, -1, -1)))

    expected_THD = torch.nn.functional.pad(step.expected_THD, (0, 0, 0, 0, 0, rows))
    new = NewKV(padded(step.new.k_TGD), padded(step.new.v_TGD))
    return Step(step.spec, captured, step.kv, new, padded(step.q_THD), expected_THD)


def attend(q_QHD: Tensor, k_CGD: Tensor, v_CGD: Tensor) -> Tensor:
    """Attention of the last Q tokens of one sequence, one row and head at a time."""
    num_rows, num_heads, head_dim = q_QHD.shape
    num_cached, num_kv_heads, _ = k_CGD.shape
    q_QHD, k_CGD, v_CGD = q_QHD.double(), k_CGD.double(), v_CGD.double()
    out_QHD = torch.empty_like(q_QHD)
    for row in range(num_rows):
        seen = num_cached - num_rows + row + 1
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores_C = k_CGD[:seen, kv_head] @ q_QHD[row, head] * head_dim**-0.5
            out_QHD[row, head] = scores_C.softmax(0) @ v_CGD[:seen, kv_head]
    return out_QHD
