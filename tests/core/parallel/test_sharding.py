"""Shards: together they are the whole tensor, and heads stay with their KV heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.parallel.sharding import Shard, Sharding, cut_problems, head_problems, size_problems

RANKS = st.integers(1, 16)


@given(RANKS, st.integers(1, 20))
def test_equal_parts_are_the_whole(ranks: int, part: int) -> None:
    size = ranks * part
    bounds = [Sharding(rank, ranks).equal(0).bounds(size) for rank in range(ranks)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(size))


@given(RANKS, st.integers(1, 100))
def test_padded_parts_are_the_whole_and_equal(ranks: int, size: int) -> None:
    shards = [Sharding(rank, ranks).padded(0) for rank in range(ranks)]
    bounds = [shard.bounds(size) for shard in shards]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(size))
    assert len({shard.local_size(size) for shard in shards}) == 1
    # Entry i of the padded whole is entry i of the tensor.
    part = shards[0].local_size(size)
    assert all(start == min(rank * part, size) for rank, (start, _) in enumerate(bounds))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_every_query_head_finds_its_kv_head(kv_heads: int, group: int, factor: int) -> None:
    heads = kv_heads * group
    for tp in range(1, heads + 1):
        if head_problems(heads, kv_heads, tp):
            continue
        for rank in range(tp):
            local = Sharding(rank, tp).heads(heads, kv_heads)
            queries = range(*local.q.bounds(heads))
            keys = range(*local.kv.bounds(kv_heads))
            assert (len(queries), len(keys)) == (local.num_heads, local.num_kv_heads)
            local_group = len(queries) // len(keys)
            for index, head in enumerate(queries):
                assert keys[index // local_group] == head // group


def test_local_shape_keeps_other_dimensions() -> None:
    assert Shard(1, 0, 4).local_shape((3, 8, 5)) == (3, 2, 5)
    assert Shard(0, 2, 4, padded=True).local_shape((5, 8)) == (2, 8)


def test_only_one_rank_adds_a_bias() -> None:
    assert [Sharding(rank, 4).adds_bias() for rank in range(4)] == [True, False, False, False]


def test_problems_are_all_told_with_what_is_allowed() -> None:
    def clauses(ranks: int) -> list[str]:
        return head_problems(9, 3, ranks) + size_problems({"intermediate_size": 1536}, ranks)

    assert cut_problems("parallel.tp=3", 3, clauses, 9) == []
    problems = cut_problems("parallel.tp=5", 5, clauses, 9)
    assert len(problems) == 3
    assert all(p.startswith("parallel.tp=5: ") and p.endswith(": 1, 3") for p in problems)
    assert "9 query heads" in problems[0]
    assert "3 KV heads" in problems[1]
    assert "intermediate_size of 1536" in problems[2]


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32, 64, 128])
def test_large_models_spread_over_powers_of_two(tp: int) -> None:
    assert head_problems(128, 8, tp) + size_problems({"intermediate_size": 53248}, tp) == []


def test_parts_end_where_blocks_end() -> None:
    sizes = {"intermediate_size": 18432}
    assert [n for n in (1, 2, 4, 8, 16, 18, 32) if not size_problems(sizes, n, 128)] == [
        1, 2, 4, 8, 16, 18,
    ]  # fmt: skip
    (problem,) = size_problems(sizes, 32, 128)
    assert "parts of 576" in problem
    assert "multiples of 128" in problem
    assert size_problems({"odd": 100}, 1, 128) == []  # the last block of a matrix may be smaller
