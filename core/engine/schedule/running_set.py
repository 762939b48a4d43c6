"""Who is in the running set: the slots, KV pages and prefix-cache locks of each request.

Knows nothing of queues, budgets or plans. `Request.slot`, `.pages`, `.node` and `.num_cached` are
written here only. A running request's first `node.depth` pages belong to the prefix cache, the
others to the request alone; the scratch page 0 belongs to nobody.
"""

from core.engine.schedule.kv_pool import KVPool
from core.engine.schedule.prefix_cache import Match, Node, NullPrefixCache, PrefixCache, Prefixes
from core.engine.schedule.request import Request
from core.settings.config import EngineConfig


class RunningSet:
    """Slots and pages of the running requests, in the order in which they entered.

    A request enters only where every running request can still grow by `headroom_tokens` (or to its
    end), so that entering does not soon lead to preempting.
    """

    def __init__(self, config: EngineConfig, *, num_pages: int, headroom_tokens: int) -> None:
        self._page_size = config.settled_page_size
        self._headroom_tokens = headroom_tokens
        self._pool = KVPool(num_pages)
        self._cache: Prefixes = (
            NullPrefixCache(self._pool)
            if config.disable_prefix_cache
            else PrefixCache(self._pool, self._page_size)
        )
        self._num_slots = config.running_limit
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self.running: dict[Request, None] = {}
        # Pages replaced by the cache's, which rows of the step being planned still use.
        self._replaced_pages: list[int] = []

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def num_usable_pages(self) -> int:
        return self._pool.num_usable

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_cached_pages(self) -> int:
        """Pages that only the prefix cache holds."""
        return self._cache.num_cached

    def take(self, count: int) -> list[int] | None:
        """Pages for one of them, evicting from the cache where needed; None if that's too few."""
        return self._cache.take(count)

    def match(self, request: Request, step: int) -> Match:
        """The cached pages it can start with in `step`; one token at least is left to compute."""
        usable = request.num_known - 1 if request.uses_cached_prefix else 0
        return self._cache.match(request.tokens, max_pages=usable // self._page_size, step=step)

    def enter(self, request: Request, match: Match) -> bool:
        """Give it a slot and the pages of all its known tokens, where there is room."""
        cache = self._cache
        cache.lock(match.node)
        num_held = -(-request.num_known // self._page_size)
        num_own = num_held - len(match.pages)
        if not self._has_room(request, num_held, num_own) or (own := cache.take(num_own)) is None:
            cache.unlock(match.node)
            return False
        request.node = match.node
        request.pages = match.pages + own
        request.slot = self._free_slots.pop()
        request.num_computed = len(match.pages) * self._page_size
        if request.num_cached is None:
            request.num_cached = request.num_computed
        self.running[request] = None
        return True

    def _has_room(self, request: Request, num_held: int, num_own: int) -> bool:
        """Whether `num_own` pages can go to a new request without starving those that run."""
        spare = self._pool.num_free + self._cache.num_cached - num_own
        if not self.running:
            return spare >= 0
        most_each = self._headroom_tokens // self._page_size + 1
        if spare >= most_each * (len(self.running) + 1):
            return True
        wanted = self._pages_soon(request, num_held)
        for running in self.running:
            wanted += self._pages_soon(running, len(running.pages))
        return spare >= wanted

    def _pages_soon(self, request: Request, num_held: int) -> int:
        """Pages it will need for its next tokens, beyond the `num_held` it has."""
        end = min(request.num_known + self._headroom_tokens, request.max_tokens_total - 1)
        return max(0, -(-end // self._page_size) - num_held)

    def share(self, request: Request, step: int) -> list[int]:
        """Put its full pages of known tokens, computed by the steps up to `step`, into the cache.

        Where the cache has such a page already, the request uses that one from the next step on;
        returns the columns where this is so. Its own page is freed by `end_step`, and not before:
        in `step` its row and another's would both write to it.
        """
        assert request.node is not None
        num_pages = min(request.num_computed, request.num_known) // self._page_size
        request.node, replaced = self._cache.extend(
            request.node, request.tokens, request.pages, num_pages, step
        )
        for column, page in replaced:
            self._replaced_pages.append(request.pages[column])
            request.pages[column] = page
        return [column for column, _ in replaced]

    def end_step(self) -> None:
        """All rows of the step are planned."""
        if self._replaced_pages:
            self._pool.give_back(self._replaced_pages)
            self._replaced_pages.clear()

    def leave(self, request: Request, step: int) -> None:
        """Take its slot, pages and lock; full pages of known tokens stay in the cache.

        The step being planned, if any, has no row of it.
        """
        self.share(request, step)
        self.end_step()
        assert request.node is not None
        self._cache.unlock(request.node)
        self._pool.give_back(request.pages[request.node.depth :])
        self._free_slots.append(request.slot)
        del self.running[request]
        request.slot = -1
        request.node = None
        request.pages = []
        request.num_computed = 0

    def check(self) -> None:
        """Assert that every page is free, cached, or held by exactly one running request."""
        self._pool.check()
        nodes: list[Node] = []
        owned = [node.page for node in self._cache.nodes() if node.depth]
        for request in self.running:
            node: Node | None = request.node
            assert node is not None
            nodes.append(node)
            owned += request.pages[node.depth :]
            while node is not None and node.depth:
                assert request.pages[node.depth - 1] == node.page, "table and cache differ"
                node = node.parent
        self._cache.check(nodes)
        free = self._pool.free_pages()
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert not free & set(owned), "a page in use is free"
        assert len(free) + len(owned) == self._pool.num_usable, "a page was lost"
        slots = [request.slot for request in self.running] + self._free_slots
        assert sorted(slots) == list(range(self._num_slots)), "a slot was lost or given twice"
