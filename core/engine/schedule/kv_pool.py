"""Page ids of the paged KV cache: which are free. Knows nothing of tensors, requests or prefixes.

Page 0 is a scratch page: runners point unused table entries and padding rows at it, so it is
never handed out. Freed pages are reused last in, first out, and pages that are taken or freed
together stay in order: a request that is alone has pages that follow one another, which backends
may read without gathering them.
"""

from collections.abc import Iterable


class KVPool:
    """A free list of the pages `1 .. num_pages - 1`.

    A page may be freed while a launched step still reads it: steps run in the order in which they
    were planned, so whoever takes it next writes to it only afterwards.
    """

    __slots__ = ("_free", "_is_free", "num_pages")

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, "a pool has the scratch page and at least one more"
        self.num_pages = num_pages  # the scratch page included
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray([0]) + bytearray([1]) * (num_pages - 1)

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, which belong to the caller from now on."""
        free, is_free = self._free, self._is_free
        assert 0 <= count <= len(free), f"{count} pages asked for, {len(free)} free"
        if not count:
            return []
        pages = free[: -count - 1 : -1]
        del free[-count:]
        for page in pages:
            is_free[page] = 0
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages to the pool."""
        free, is_free = self._free, self._is_free
        for page in reversed(list(pages)):
            assert page > 0, f"page {page} is not in the pool"
            assert not is_free[page], f"page {page} was freed twice"
            is_free[page] = 1
            free.append(page)

    def free_pages(self) -> set[int]:
        """A copy, for checks."""
        return set(self._free)

    def check(self) -> None:
        """Assert that the free list and the flags agree."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert all(0 < page < self.num_pages for page in free)
        flagged = {page for page, flag in enumerate(self._is_free) if flag}
        assert free == flagged, "free list and flags differ"
