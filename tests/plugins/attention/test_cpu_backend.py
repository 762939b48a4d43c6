"""How the CPU backend buckets sequences, and what it keeps to a bound."""

import dataclasses
import random

import pytest
import torch

from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from core.plugin.hookspecs import NoOptions
from plugins.attention._cpu.heads import CpuBackend, build, group_by_length


def buckets(lengths: list[int], most_tokens: int, most_padding: int) -> list[list[int]]:
    return list(group_by_length(list(range(len(lengths))), lengths, most_tokens, most_padding))


def test_equal_lengths_share_a_bucket_in_order() -> None:
    assert buckets([7, 7, 7], 100, 0) == [[0, 1, 2]]


def test_a_long_sequence_does_not_pad_short_ones() -> None:
    assert buckets([10, 5000, 12], 100_000, 64) == [[1], [0, 2]]


def test_one_sequence_may_exceed_the_bound() -> None:
    assert buckets([500, 400], 100, 1000) == [[0], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_buckets_hold_every_sequence_once_within_the_bounds(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 3000) for _ in range(source.randint(1, 80))]
    result = buckets(lengths, 5000, 600)
    assert sorted(index for bucket in result for index in bucket) == list(range(len(lengths)))
    for bucket in result:
        longest = max(lengths[index] for index in bucket)
        assert bucket == sorted(bucket)
        assert len(bucket) == 1 or len(bucket) * longest <= 5000
        assert sum(longest - lengths[index] for index in bucket) <= 600


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Remembers the most bytes any torch call returned in one tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


def long_chunk(
    num_rows: int, num_cached: int
) -> tuple[CpuBackend, SequenceBatch, LayerKV, torch.Tensor]:
    """A backend, a batch of one long sequence, its cache and queries."""
    spec = AttentionSpec(
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        scale=0.25,
        page_size=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_context_tokens=num_cached,
    )
    num_pages = num_cached // 16
    table = torch.arange(1, num_pages + 1, dtype=torch.int32).unsqueeze(0)
    batch = SequenceBatch(
        [num_rows],
        [num_cached],
        torch.tensor([0, num_rows], dtype=torch.int32),
        torch.tensor([num_cached], dtype=torch.int32),
        table,
    )
    backend = build(NoOptions(), spec)
    k, v = (torch.randn(num_pages + 1, 16, 1, 16) for _ in range(2))
    return backend, batch, LayerKV(k, v), torch.randn(num_rows, 2, 16)


@pytest.mark.parametrize("cached_before", [0, 4096])
def test_no_tensor_grows_with_the_square_of_a_chunk(cached_before: int) -> None:
    num_rows = 4096
    torch.manual_seed(0)
    backend, batch, kv, q_THD = long_chunk(num_rows, num_rows + cached_before)
    out_THD = torch.empty_like(q_THD)
    with LargestTensor() as largest:
        backend.forward(backend.plan(batch), kv, q_THD, out_THD)
    # The mask of a block of 256 rows is the largest; all scores would be 64 MiB a head and more.
    assert 0 < largest.num_bytes <= 256 * 4 * (num_rows + cached_before + 256)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_pages_in_any_order_give_the_same_as_pages_in_a_row(num_rows: int) -> None:
    """Those in a row are read where they lie."""
    torch.manual_seed(1)
    backend, batch, kv, q_THD = long_chunk(num_rows, 48)
    in_a_row = torch.empty_like(q_THD)
    backend.forward(backend.plan(batch), kv, q_THD, in_a_row)
    order = torch.tensor([2, 3, 1])
    moved = LayerKV(torch.full_like(kv.k_NPGD, torch.nan), torch.full_like(kv.v_NPGD, torch.nan))
    moved.k_NPGD[order], moved.v_NPGD[order] = kv.k_NPGD[1:], kv.v_NPGD[1:]
    elsewhere = dataclasses.replace(batch, page_table_SM=order.int().unsqueeze(0))
    out_THD = torch.empty_like(q_THD)
    backend.forward(backend.plan(elsewhere), moved, q_THD, out_THD)
    assert torch.equal(out_THD, in_a_row)
