"""The requests that wait for a slot, in two orders: by age and by length. Pure; knows nothing of
pages or steps.

Either order begins with the lowest `Request.priority`. Age counts by arrival, also for a request
that was preempted. Length is what a request had to compute when it came to wait.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from core.engine.schedule.request import Request

Key = tuple[int, int, int]


def age_key(request: Request) -> tuple[int, int]:
    """Less for one that is looked after first: a lower priority, or an earlier arrival."""
    return request.priority, request.arrival


def _length_key(request: Request) -> Key:
    return request.priority, request.waiting_tokens, request.arrival


class WaitingQueue:
    """Sorted lists: adding and removing move memory, which for thousands takes microseconds."""

    def __init__(self) -> None:
        self._by_age: list[Request] = []
        self._by_length: list[Request] = []
        self.tokens = 0  # that all of them had to compute when they came to wait

    def __len__(self) -> int:
        return len(self._by_age)

    def __contains__(self, request: Request) -> bool:
        at = bisect_left(self._by_age, age_key(request), key=age_key)
        return at < len(self._by_age) and self._by_age[at] is request

    def add(self, request: Request, tokens: int) -> None:
        """It waits with about so many tokens to compute."""
        request.waiting_tokens = tokens
        self.tokens += tokens
        insort(self._by_age, request, key=age_key)
        insort(self._by_length, request, key=_length_key)

    def remove(self, request: Request) -> None:
        for requests, key in ((self._by_age, age_key), (self._by_length, _length_key)):
            at = bisect_left(requests, key(request), key=key)
            assert requests[at] is request
            del requests[at]
        self.tokens -= request.waiting_tokens

    @property
    def oldest(self) -> Request | None:
        return self._by_age[0] if self._by_age else None

    def by_age(self) -> Iterator[Request]:
        """A copy is walked: requests may be removed meanwhile."""
        return iter(self._by_age.copy())

    def by_length(self) -> Iterator[Request]:
        return iter(self._by_length.copy())

    def check(self) -> None:
        """Assert that both orders hold the same requests."""
        assert self._by_age == sorted(self._by_age, key=age_key)
        assert self._by_length == sorted(self._by_length, key=_length_key)
        assert set(self._by_age) == set(self._by_length)
        assert len(set(self._by_age)) == len(self._by_age) == len(self._by_length)
