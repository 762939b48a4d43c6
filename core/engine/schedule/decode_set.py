"""The requests that decode one token each step, laid out so that a step costs little per request.

Every member has a row in every planned step, so what happens to it later is known by step
number: two calendars say in which step it needs its next page and which step yields its last
possible token. A step looks at those due, not at all members. Knows nothing of pools or plans.
"""

from core.engine.schedule.request import Request

Day = dict[Request, None]  # a set in the order of insertion, so that runs are reproducible


class DecodeSet:
    """Parallel lists by row. `requests`, `slots` and `starts` are copied before they are kept."""

    __slots__ = (
        "_last_steps",
        "_num_choosy",
        "_page_size",
        "_pages_due",
        "requests",
        "slots",
        "starts",
    )

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.requests: list[Request] = []
        self.slots: list[int] = []
        self.starts: list[int] = []  # position that the next planned step computes
        self._pages_due: dict[int, Day] = {}
        self._last_steps: dict[int, Day] = {}
        self._num_choosy = 0  # members that need more of logits than the best token

    @property
    def best_only(self) -> bool:
        """Whether every member takes the best token, and wants no more of the logits."""
        return self._num_choosy == 0

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request, step: int) -> None:
        """From `step` on, starting at position `request.num_computed`."""
        start = request.num_computed
        request.row = len(self.requests)
        self._num_choosy += not request.sampling.takes_best
        self.requests.append(request)
        self.slots.append(request.slot)
        self.starts.append(start)
        # The row at position p yields token p + 1.
        request.last_step = step + request.max_tokens_total - 2 - start
        self._last_steps.setdefault(request.last_step, {})[request] = None
        request.page_due = step + len(request.pages) * self._page_size - start
        self._pages_due.setdefault(request.page_due, {})[request] = None

    def remove(self, request: Request) -> None:
        """Take it out; `num_computed` becomes the positions of all steps planned so far."""
        row = request.row
        request.row = -1
        self._num_choosy -= not request.sampling.takes_best
        request.num_computed = self.starts[row]
        last, slot, start = self.requests.pop(), self.slots.pop(), self.starts.pop()
        if last is not request:
            last.row = row
            self.requests[row], self.slots[row], self.starts[row] = last, slot, start
        _forget(self._last_steps, request.last_step, request)
        _forget(self._pages_due, request.page_due, request)

    def pop_needing_page(self, step: int) -> list[Request]:
        """Those whose row in `step` has no page; each is given one (`grew`) or removed."""
        return list(self._pages_due.pop(step, ()))

    def grew(self, requests: list[Request], step: int) -> None:
        """These have a page for the positions from `step` on."""
        due = step + self._page_size
        day = self._pages_due.setdefault(due, {})
        for request in requests:
            request.page_due = due
            day[request] = None

    def pop_last(self, step: int) -> list[tuple[Request, int]]:
        """Those whose row in `step`, already planned, is their last, with that row; removed."""
        ending = [(request, request.row) for request in self._last_steps.pop(step, ())]
        for request, _ in ending:
            self.remove(request)
        return ending

    def advance(self) -> list[int]:
        """Plan one step: the position of each row in it."""
        starts = self.starts
        self.starts = [start + 1 for start in starts]
        return starts

    def check(self, next_step: int) -> None:
        """Assert that rows and calendars agree, before `next_step` is planned."""
        assert len(self.requests) == len(self.slots) == len(self.starts)
        for row, (request, slot, start) in enumerate(
            zip(self.requests, self.slots, self.starts, strict=True)
        ):
            assert request.row == row
            assert request.slot == slot
            left = request.max_tokens_total - 2 - start
            assert left >= 0, "a row can't be needed any more"
            assert request.last_step == next_step + left
            assert request in self._last_steps[request.last_step]
            room = len(request.pages) * self._page_size - start
            assert room >= 0, "a row has no page"
            assert request.page_due == next_step + room
            assert request in self._pages_due[request.page_due]
        choosy = sum(not request.sampling.takes_best for request in self.requests)
        assert self._num_choosy == choosy
        members = set(self.requests)
        for calendar in (self._pages_due, self._last_steps):
            assert set().union(*calendar.values()) <= members, "a calendar kept a request"


def _forget(calendar: dict[int, Day], step: int, request: Request) -> None:
    day = calendar.get(step)
    if day is not None:
        day.pop(request, None)
        if not day:
            del calendar[step]
