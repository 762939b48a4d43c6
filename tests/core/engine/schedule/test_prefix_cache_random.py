"""Random holders of prefixes against the cache: contents, owners, locks and eviction."""

import dataclasses

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.engine.schedule.kv_pool import KVPool
from core.engine.schedule.prefix_cache import Node, PrefixCache


@dataclasses.dataclass
class Holder:
    """Someone who reads `pages`, which hold `tokens`, and has the lock on `node`."""

    node: Node
    tokens: list[int]
    pages: list[int]
    namespace: str


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(3, 14), page_size=st.integers(1, 3))
    def start(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = KVPool(num_pages)
        self.cache = PrefixCache(self.pool, page_size)
        self.holders: list[Holder] = []
        self.step = 1
        # What was last written into each page: its namespace and all tokens up to its end.
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}

    def _write(self, holder: Holder, column: int) -> None:
        tokens = tuple(holder.tokens[: (column + 1) * self.page_size])
        self.contents[holder.pages[column]] = (holder.namespace, tokens)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=12), namespace=st.sampled_from(["", "a"]))
    def hold(self, tokens: list[int], namespace: str) -> None:
        self.step += 1
        num_pages = len(tokens) // self.page_size
        found = self.cache.match(tokens, max_pages=num_pages, step=self.step, namespace=namespace)
        assert found.node.depth == len(found.pages)
        self.cache.lock(found.node)
        evictable, free = self.cache.num_cached, self.pool.num_free
        own = self.cache.take(num_pages - len(found.pages))
        if own is None:
            assert num_pages - len(found.pages) > evictable + free
            self.cache.unlock(found.node)
            return
        holder = Holder(found.node, tokens, found.pages + own, namespace)
        for column in range(len(found.pages), num_pages):
            self._write(holder, column)
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 100), pages=st.integers(0, 12))
    def share(self, which: int, pages: int) -> None:
        holder = self.holders[which % len(self.holders)]
        num_pages = min(pages, len(holder.pages))
        holder.node, replaced = self.cache.extend(
            holder.node, holder.tokens, holder.pages, num_pages, self.step
        )
        for column, page in replaced:
            self.pool.give_back([holder.pages[column]])
            holder.pages[column] = page
        assert holder.node.depth >= num_pages

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        holder = self.holders.pop(which % len(self.holders))
        self.cache.unlock(holder.node)
        self.pool.give_back(holder.pages[holder.node.depth :])

    @rule(count=st.integers(1, 4))
    def squeeze(self, count: int) -> None:
        """Somebody takes pages and returns them: cached ones may be gone."""
        pages = self.cache.take(count)
        if pages is not None:
            for page in pages:
                self.contents.pop(page, None)
            self.pool.give_back(pages)

    @invariant()
    def everybody_reads_what_was_written_for_them(self) -> None:
        for holder in self.holders:
            for column, page in enumerate(holder.pages):
                tokens = tuple(holder.tokens[: (column + 1) * self.page_size])
                assert self.contents[page] == (holder.namespace, tokens)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.pool.check()
        self.cache.check([holder.node for holder in self.holders])
        owned = [node.page for node in self.cache.nodes() if node.depth]
        for holder in self.holders:
            owned += holder.pages[holder.node.depth :]
        assert sorted(owned + list(self.pool.free_pages())) == list(range(1, self.pool.num_pages))

    def teardown(self) -> None:
        while getattr(self, "holders", None):
            self.release(0)
        if hasattr(self, "pool"):
            assert self.pool.num_free + self.cache.num_cached == self.pool.num_usable
            assert self.cache.take(self.pool.num_usable) is not None
            assert list(self.cache.nodes()) == []


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure, add Phase.shrink and some minutes
)
