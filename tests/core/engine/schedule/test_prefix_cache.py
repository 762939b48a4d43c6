"""The prefix cache by example."""

from core.engine.schedule.kv_pool import KVPool
from core.engine.schedule.prefix_cache import Match, Node, NullPrefixCache, PrefixCache, Prefixes

PAGE_SIZE = 2
SYSTEM = [10, 11, 12, 13]  # two pages


def match(cache: Prefixes, tokens: list[int], step: int = 9, namespace: str = "") -> Match:
    return cache.match(tokens, max_pages=len(tokens) // PAGE_SIZE, step=step, namespace=namespace)


def insert(cache: Prefixes, tokens: list[int], step: int = 1, namespace: str = "") -> Node:
    """Insert all full pages of `tokens` in new pages; returns the node, still locked."""
    found = match(cache, tokens, namespace=namespace)
    cache.lock(found.node)
    num_pages = len(tokens) // PAGE_SIZE
    own = cache.take(num_pages - len(found.pages))
    assert own is not None
    return cache.extend(found.node, tokens, found.pages + own, num_pages, step).node


def new_cache(num_pages: int = 9) -> tuple[KVPool, PrefixCache]:
    pool = KVPool(num_pages)
    return pool, PrefixCache(pool, PAGE_SIZE)


def test_full_pages_are_found_again_as_far_as_tokens_agree() -> None:
    _, cache = new_cache()
    node = insert(cache, [*SYSTEM, 20, 21])
    found = match(cache, [*SYSTEM, 20, 99, 98])
    assert len(found.pages) == 2
    assert node.parent is found.node
    assert found.pages[1] == found.node.page
    assert match(cache, [10, 99, 12, 13]).pages == []


def test_the_tail_of_a_page_is_not_cached() -> None:
    _, cache = new_cache()
    insert(cache, [*SYSTEM, 20])
    assert len(match(cache, [*SYSTEM, 20, 21]).pages) == 2


def test_namespaces_share_nothing() -> None:
    _, cache = new_cache()
    one, two = insert(cache, SYSTEM, namespace="one"), insert(cache, SYSTEM, namespace="two")
    assert one.page != two.page
    assert match(cache, SYSTEM).pages == []
    assert match(cache, SYSTEM, namespace="two").pages[-1] == two.page


def test_an_empty_namespace_is_forgotten() -> None:
    pool, cache = new_cache(num_pages=3)
    cache.unlock(insert(cache, SYSTEM, namespace="gone"))
    pages = cache.take(2)
    assert pages is not None
    pool.give_back(pages)
    cache.lock(unused := match(cache, SYSTEM, namespace="unused").node)
    cache.unlock(unused)
    assert list(cache.nodes()) == []


def test_a_page_of_the_step_being_planned_is_pending_until_the_next() -> None:
    _, cache = new_cache()
    cache.unlock(insert(cache, SYSTEM[:2], step=6))
    insert(cache, SYSTEM, step=7)
    now = match(cache, SYSTEM, step=7)
    assert (len(now.pages), now.num_pending) == (1, 1)
    later = match(cache, SYSTEM, step=8)
    assert (len(later.pages), later.num_pending) == (2, 0)


def test_a_page_computed_twice_is_told_and_not_freed_by_the_cache() -> None:
    pool, cache = new_cache()
    first = insert(cache, SYSTEM)
    root = first.parent.parent  # type: ignore[union-attr]
    assert root is not None
    own = pool.take(3)
    cache.lock(root)
    extended = cache.extend(root, [*SYSTEM, 20, 21], own, 3, 1)
    found = match(cache, SYSTEM)
    assert extended.replaced == [(0, found.pages[0]), (1, found.pages[1])]
    assert extended.node.page == own[2]
    assert not set(own) & pool.free_pages()
    cache.check([first, extended.node])


def test_locked_paths_are_not_evicted() -> None:
    pool, cache = new_cache(num_pages=5)
    locked = insert(cache, SYSTEM)
    cache.unlock(insert(cache, [*SYSTEM, 20, 21, 22, 23]))
    assert (pool.num_free, cache.num_cached) == (0, 2)
    assert cache.take(3) is None
    assert cache.take(2) is not None
    assert len(match(cache, [*SYSTEM, 20, 21]).pages) == 2
    assert cache.num_cached == 0
    cache.unlock(locked)
    assert cache.num_cached == 2
    assert cache.take(2) is not None


def test_the_least_recently_used_leaf_goes_first() -> None:
    _, cache = new_cache(num_pages=5)
    old, new = [*SYSTEM, 20, 21], [*SYSTEM, 30, 31]
    cache.unlock(insert(cache, old))
    cache.unlock(insert(cache, new))
    cache.lock(touched := match(cache, old).node)
    cache.unlock(touched)
    assert cache.take(1) is not None
    assert len(match(cache, old).pages) == 3
    assert len(match(cache, new).pages) == 2
    assert cache.take(1) is not None
    assert len(match(cache, old).pages) == 2  # then the leaf, before what it hangs on


def test_eviction_entries_do_not_pile_up() -> None:
    _, cache = new_cache()
    node = insert(cache, SYSTEM)
    for _ in range(10_000):
        cache.unlock(node)
        cache.lock(node)
    assert len(cache._heap) < 100
    cache.check([node])


def test_the_null_cache_finds_nothing_and_keeps_nothing() -> None:
    pool = KVPool(5)
    cache = NullPrefixCache(pool)
    node = insert(cache, SYSTEM)
    assert node.depth == 0
    assert match(cache, SYSTEM).pages == []
    assert pool.num_free == 2
    assert cache.take(3) is None
    cache.check([node])
    cache.unlock(node)
    cache.check([])
