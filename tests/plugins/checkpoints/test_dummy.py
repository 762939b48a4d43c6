"""Dummy weights: the same tensor however it is cut, different tensors for different names."""

from itertools import pairwise

import pytest
import torch

from core.interfaces.weights import Shard
from plugins.checkpoints._dummy_reader import TABLE_SIZE, DummyReader
from tests.support.models import CPU, ignore_progress


def reader(seed: int = 0, dtype: torch.dtype = torch.float32) -> DummyReader:
    return DummyReader(seed, dtype, CPU, ignore_progress)


@pytest.mark.parametrize("shape", [(48,), (48, 20), (7, 2100), (6, 8, 10)])
@pytest.mark.parametrize("padded", [False, True])
def test_parts_are_the_whole(shape: tuple[int, ...], padded: bool) -> None:
    whole = reader().take("some.weight", shape)
    assert whole.shape == shape
    for dim, size in enumerate(shape):
        for count in range(2, 9):
            if size % count != 0 and not padded:
                continue
            parts = [
                reader().take("some.weight", shape, Shard(dim, index, count, padded))
                for index in range(count)
            ]
            assert len({part.shape for part in parts}) == 1
            joined = torch.cat(parts, dim)
            assert torch.equal(joined.narrow(dim, 0, size), whole)
            assert joined.narrow(dim, size, joined.shape[dim] - size).abs().sum() == 0


def test_values_are_normal_and_names_and_seeds_matter() -> None:
    first = reader().take("a.weight", (400, 500))
    assert abs(first.mean().item()) < 2e-4
    assert abs(first.std().item() - 0.02) < 2e-4
    assert torch.equal(first, reader().take("a.weight", (400, 500)))
    for other in (reader().take("b.weight", (400, 500)), reader(1).take("a.weight", (400, 500))):
        correlation = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]
        assert abs(correlation.item()) < 0.02


def test_rows_of_a_tensor_longer_than_the_table_differ() -> None:
    tensor = reader(dtype=torch.bfloat16).take("wide", (3, TABLE_SIZE + 10))
    assert torch.equal(tensor[0, :10], tensor[0, TABLE_SIZE:])  # it wraps
    for upper, lower in pairwise(tensor):
        assert not torch.equal(upper, lower)


def test_norms_are_about_one_and_biases_about_zero() -> None:
    assert abs(reader().take("model.norm.weight", (64,)).mean().item() - 1) < 0.02
    assert abs(reader().take("q_proj.bias", (64,)).mean().item()) < 0.02


def test_scopes_are_part_of_the_name() -> None:
    one = reader(dtype=torch.bfloat16)
    assert torch.equal(one.scope("a").take("w", (3, 4)), one.take("a.w", (3, 4)))
    assert not one.has("a.w")
    one.finish()
