"""KV pages of known token prefixes, shared between requests: a radix tree with one page an edge.

A node is one full page; its path from the root spells the tokens up to its end. Keys are the
exact tokens (as bytes, whose hash Python keys at random in each process), so nothing is ever
shared by a collision. Trees of different namespaces have different roots and share nothing.

Knows pages and tokens; nothing of requests, slots or steps, except that a page inserted in the
step now being planned can't be read by that step ("pending").

Protection: a request locks the deepest node of its path. `Node.refs` counts a node's own locks
plus its children with any refs, so a node is protected exactly while `refs > 0`, and the cost of
locking is the part of the path that was unprotected before.
"""

import heapq
import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from core.engine.schedule.kv_pool import KVPool

_TOKEN_BYTES = array("i").itemsize


class Node:
    """One cached page, or the root of a namespace (depth 0, page 0)."""

    __slots__ = ("children", "depth", "inserted", "key", "last_used", "page", "parent", "refs")

    def __init__(self, parent: "Node | None", key: bytes, page: int, inserted: int) -> None:
        self.parent = parent  # None: a root, or evicted
        self.key = key  # the page's tokens; of a root, its namespace
        self.page = page
        self.inserted = inserted  # the last step planned when the page was inserted
        self.depth: int = 0 if parent is None else parent.depth + 1  # pages on the path
        self.children: dict[bytes, Node] = {}
        self.refs = 0
        self.last_used = 0  # the clock when it was last protected


class Match(NamedTuple):
    """What `match` found: pages that can be read now, and how many more from the next step on."""

    node: Node  # the deepest readable one; lock it before anything else is called
    pages: list[int]
    num_pending: int


class Extended(NamedTuple):
    """What `extend` did. `replaced`: columns whose page was computed twice, and the cache's page
    of it; the caller uses that one from now on, and frees its own."""

    node: Node
    replaced: list[tuple[int, int]]


class Prefixes(Protocol):
    """What the scheduler needs of a prefix cache; `NullPrefixCache` caches nothing."""

    @property
    def num_cached(self) -> int:
        """Pages held by the cache alone: they can be evicted."""
        ...

    def match(
        self, tokens: Sequence[int], *, max_pages: int, step: int, namespace: str = ""
    ) -> Match:
        """The longest cached prefix of at most `max_pages` pages, for a request of `step`."""
        ...

    def lock(self, node: Node) -> None:
        """Protect a node and its path from eviction; balanced by `unlock`."""
        ...

    def unlock(self, node: Node) -> None: ...

    def extend(
        self, node: Node, tokens: Sequence[int], pages: Sequence[int], num_pages: int, step: int
    ) -> Extended:
        """Insert `pages[node.depth:num_pages]`, full pages of `tokens`, under a locked node.

        The lock moves to the returned node, and the pages up to its depth belong to the cache.
        """
        ...

    def take(self, count: int) -> list[int] | None:
        """Pages from the pool, evicting where needed; None where that is not enough."""
        ...

    def nodes(self) -> Iterator[Node]:
        """Every node, the roots included, parents first."""
        ...

    def check(self, locks: Sequence[Node]) -> None:
        """Assert every invariant, given the node of each lock that is held now."""
        ...


class PrefixCache:
    """The radix tree; evicts the least recently used unprotected leaf first."""

    def __init__(self, pool: KVPool, page_size: int) -> None:
        self._pool = pool
        self._page_bytes = page_size * _TOKEN_BYTES
        self._page_size = page_size
        self._roots: dict[str, Node] = {}
        self._num_nodes = 0  # without roots
        self._num_cached = 0  # nodes with refs == 0, without roots
        self._clock = itertools.count(1)
        # Leaves that may be evicted, by last_used; entries that no longer hold are skipped.
        self._heap: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()

    @property
    def num_cached(self) -> int:
        return self._num_cached

    def match(
        self, tokens: Sequence[int], *, max_pages: int, step: int, namespace: str = ""
    ) -> Match:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, namespace.encode(), 0, 0)
        node, pages, num_pending = root, [], 0
        page_bytes = self._page_bytes
        packed = array("i", tokens[: max_pages * self._page_size]).tobytes()
        deepest = root
        for start in range(0, len(packed) - page_bytes + 1, page_bytes):
            child = node.children.get(packed[start : start + page_bytes])
            if child is None:
                break
            node = child
            # Whatever lies under a pending node is pending too.
            if child.inserted == step:
                num_pending += 1
            else:
                pages.append(child.page)
                deepest = child
        return Match(deepest, pages, num_pending)

    def lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            at.refs += 1
            if at.refs > 1:
                return
            if at.parent is not None:
                self._num_cached -= 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            assert at.refs > 0, "a node was unlocked more often than locked"
            at.refs -= 1
            if at.refs:
                return
            at.last_used = next(self._clock)
            if at.parent is not None:
                self._num_cached += 1
                if not at.children:
                    self._offer(at)
            elif not at.children:
                self._drop_root(at)
            at = at.parent

    def extend(
        self, node: Node, tokens: Sequence[int], pages: Sequence[int], num_pages: int, step: int
    ) -> Extended:
        first = node.depth
        if num_pages <= first:
            return Extended(node, [])
        page_size, page_bytes = self._page_size, self._page_bytes
        packed = array("i", tokens[first * page_size : num_pages * page_size]).tobytes()
        assert len(packed) == (num_pages - first) * page_bytes, "only full pages are cached"
        replaced: list[tuple[int, int]] = []
        at = node
        for column in range(first, num_pages):
            start = (column - first) * page_bytes
            key = packed[start : start + page_bytes]
            child = at.children.get(key)
            if child is None:
                child = at.children[key] = Node(at, key, pages[column], step)
                self._num_nodes += 1
                self._num_cached += 1
            else:
                assert child.page != pages[column], "a page was inserted twice"
                replaced.append((column, child.page))
            at = child
        self.lock(at)
        self.unlock(node)
        return Extended(at, replaced)

    def take(self, count: int) -> list[int] | None:
        missing = count - self._pool.num_free
        if missing > 0:
            if missing > self._num_cached:
                return None
            for _ in range(missing):
                self._evict_one()
        return self._pool.take(count)

    def _offer(self, node: Node) -> None:
        """Put an unprotected leaf up for eviction."""
        if len(self._heap) > 2 * self._num_nodes + 64:
            self._heap = [entry for entry in self._heap if self._evictable(entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (node.last_used, next(self._serial), node))

    @staticmethod
    def _evictable(entry: tuple[int, int, Node]) -> bool:
        # A node that has got children since was locked then, so that last_used has moved on.
        last_used, _, node = entry
        return node.parent is not None and not node.refs and node.last_used == last_used

    def _evict_one(self) -> None:
        heap = self._heap
        while not self._evictable(entry := heapq.heappop(heap)):
            pass
        node = entry[2]
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.parent = None
        self._num_nodes -= 1
        self._num_cached -= 1
        self._pool.give_back((node.page,))
        if parent.children or parent.refs:
            return
        if parent.parent is not None:
            self._offer(parent)
        else:
            self._drop_root(parent)

    def _drop_root(self, root: Node) -> None:
        """Forget an empty namespace, so that their number is bounded by the pool."""
        namespace = root.key.decode()
        if self._roots.get(namespace) is root:
            del self._roots[namespace]

    def nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self, locks: Sequence[Node]) -> None:
        nodes = list(self.nodes())
        inner = [node for node in nodes if node.depth]
        pages = {node.page for node in inner}
        assert len(inner) == len(pages) == self._num_nodes, "a page is cached twice"
        assert not pages & self._pool.free_pages(), "a cached page is free"
        held: dict[Node, int] = {}
        for node in locks:
            held[node] = held.get(node, 0) + 1
        assert set(held) <= set(nodes), "a locked node was evicted"
        offered = {entry[2] for entry in self._heap if self._evictable(entry)}
        for node in nodes:
            used_children = sum(1 for child in node.children.values() if child.refs)
            assert node.refs == held.get(node, 0) + used_children, "locks are not balanced"
            assert all(child.parent is node for child in node.children.values())
            if node.depth and not node.refs and not node.children:
                assert node in offered, "an unprotected leaf can't be evicted"
        assert self._num_cached == sum(1 for node in inner if not node.refs)


class NullPrefixCache:
    """Caches nothing: every request computes its whole prompt into pages of its own."""

    num_cached = 0

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._root = Node(None, b"", 0, 0)

    def match(
        self, tokens: Sequence[int], *, max_pages: int, step: int, namespace: str = ""
    ) -> Match:
        return Match(self._root, [], 0)

    def lock(self, node: Node) -> None:
        node.refs += 1

    def unlock(self, node: Node) -> None:
        node.refs -= 1

    def extend(
        self, node: Node, tokens: Sequence[int], pages: Sequence[int], num_pages: int, step: int
    ) -> Extended:
        return Extended(node, [])

    def take(self, count: int) -> list[int] | None:
        return self._pool.take(count) if count <= self._pool.num_free else None

    def nodes(self) -> Iterator[Node]:
        yield self._root

    def check(self, locks: Sequence[Node]) -> None:
        assert self._root.refs == len(locks), "locks are not balanced"
