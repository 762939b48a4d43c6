"""The KV pool by example and by random takes and returns."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.engine.schedule.kv_pool import KVPool


def test_the_scratch_page_is_never_handed_out() -> None:
    pool = KVPool(4)
    assert pool.num_usable == pool.num_free == 3
    assert sorted(pool.take(3)) == [1, 2, 3]
    assert pool.num_free == 0


def test_taking_nothing_takes_nothing() -> None:
    pool = KVPool(4)
    assert pool.take(0) == []
    assert pool.num_free == 3


@pytest.mark.parametrize("pages", [[1, 1], [3], [0], [-1]])
def test_giving_back_what_is_not_held_is_refused(pages: list[int]) -> None:
    pool = KVPool(4)
    held = pool.take(2)
    assert held == [1, 2]
    with pytest.raises(AssertionError):
        pool.give_back(pages)


def test_what_is_taken_together_stays_in_order() -> None:
    pool = KVPool(16)
    first = pool.take(4) + pool.take(1)
    assert first == [1, 2, 3, 4, 5]
    pool.give_back(first)
    assert pool.take(3) + pool.take(2) == first


def test_taking_more_than_there_is_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 pages asked for, 2 free"):
        KVPool(3).take(3)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(2, 12))
    def start(self, num_pages: int) -> None:
        self.pool = KVPool(num_pages)
        self.held: list[int] = []

    @rule(count=st.integers(0, 11))
    def take(self, count: int) -> None:
        pages = self.pool.take(min(count, self.pool.num_free))
        assert not set(pages) & set(self.held)
        self.held += pages

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        pages = data.draw(
            st.lists(st.sampled_from(self.held), unique=True) if self.held else st.just([])
        )
        self.pool.give_back(pages)
        self.held = [page for page in self.held if page not in pages]

    @invariant()
    def no_page_is_lost(self) -> None:
        self.pool.check()
        assert self.pool.free_pages() | set(self.held) == set(range(1, self.pool.num_pages))
        assert self.pool.num_free + len(self.held) == self.pool.num_usable


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
