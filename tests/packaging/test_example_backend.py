"""The example's attention backend against plain float64 attention over the gathered cache."""

import sys
from pathlib import Path

import pytest
import torch

from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch

EXAMPLE = Path(__file__).parents[2] / "examples/acme_attention"


def reference(q_HD, k_CGD, v_CGD, scale):
    """One row that sees all of k and v, head by head."""
    group = q_HD.shape[0] // k_CGD.shape[1]
    out = torch.empty_like(q_HD)
    for h in range(q_HD.shape[0]):
        weights_C = torch.softmax(k_CGD[:, h // group] @ q_HD[h] * scale, dim=0)
        out[h] = weights_C @ v_CGD[:, h // group]
    return out


@pytest.mark.parametrize("query_block", [1, 3, 256])
@pytest.mark.parametrize("page_size", [1, 4])
def test_it_agrees_with_plain_attention(monkeypatch, query_block, page_size):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in [name for name in sys.modules if name.split(".")[0] == "acme_attention"]:
        monkeypatch.delitem(sys.modules, name)
    from acme_attention import AcmeOptions
    from acme_attention.backend import AcmeAttention

    generator = torch.Generator().manual_seed(0)
    query_lens, context_lens = [5, 1, 7], [5, 9, 12]
    num_pages = [-(-context // page_size) for context in context_lens]
    order = torch.randperm(sum(num_pages), generator=generator) + 1  # page 0 is scratch
    table = torch.zeros(3, max(num_pages), dtype=torch.int32)
    for s, pages in enumerate(order.split(num_pages)):
        table[s, : num_pages[s]] = pages
    shape = (sum(num_pages) + 1, page_size, 2, 8)
    k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "kv")
    q = torch.randn(sum(query_lens), 4, 8, generator=generator, dtype=torch.float64)
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        scale=0.3,
        page_size=page_size,
        dtype=torch.float64,
        device=torch.device("cpu"),
        max_context_tokens=16,
    )
    batch = SequenceBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        query_starts_S1=torch.tensor([0, 5, 6, 13], dtype=torch.int32),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32),
        page_table_SM=table,
    )
    backend = AcmeAttention(AcmeOptions(query_block=query_block), spec)
    out = torch.full_like(q, float("nan"))
    backend.forward(backend.plan(batch), LayerKV(k, v), q, out)

    row = 0
    for s, (num_new, num_context) in enumerate(zip(query_lens, context_lens, strict=True)):
        k_CGD, v_CGD = (x[table[s, : num_pages[s]].long()].flatten(0, 1) for x in (k, v))
        for i in range(num_new):
            seen = num_context - num_new + i + 1
            expected = reference(q[row], k_CGD[:seen], v_CGD[:seen], 0.3)
            torch.testing.assert_close(out[row], expected)
            row += 1
    assert row == len(q)
