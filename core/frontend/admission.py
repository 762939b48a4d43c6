"""How many requests are taken at once: those that run and those that wait, whoever asks.

Knows nothing of HTTP. `Engine.generate` refuses what is too much by itself; a frontend that asks
here first is refused before it tokenizes, and counts what it is tokenizing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import RequestError
from core.interfaces.frontend import Engine, EngineState


class Admission:
    """Of one engine; a server has one."""

    def __init__(self, engine: Engine, max_live: int) -> None:
        self._engine = engine
        self.max_live = max_live
        self._num_coming = 0  # requests that the engine is yet to hear of

    def admit(self, num_requests: int) -> None:
        """Raise RequestError 429 where that many more requests don't fit into the queue.

        An engine that accepts nothing at all answers for itself, with 503, in `generate`.
        """
        if num_requests > self.max_live:
            raise RequestError(
                f"this asks for {num_requests} answers at once; allowed: 1 to {self.max_live}",
                param="n",
                code="out_of_range",
            )
        serving = self._engine.state is EngineState.SERVING
        num_live = self._engine.num_live + self._num_coming
        if serving and num_live + num_requests > self.max_live:
            raise queue_full(num_live, self.max_live)

    @contextmanager
    def submitting(self, num_requests: int) -> Iterator[Callable[[], None]]:
        """Counts admitted requests until each is submitted: the value is called after each."""
        left = num_requests
        self._num_coming += num_requests

        def submitted() -> None:
            nonlocal left
            left -= 1
            self._num_coming -= 1

        try:
            yield submitted
        finally:
            self._num_coming -= left

    @contextmanager
    def tokenizing(self, num_requests: int) -> Iterator[None]:
        """Around the work that comes before so many requests: refuses it as `admit` does, and
        counts them meanwhile, so that the queue's limit bounds this work too."""
        self.admit(num_requests)
        self._num_coming += num_requests
        try:
            yield
        finally:
            self._num_coming -= num_requests


def queue_full(num_live: int, max_live: int) -> RequestError:
    return RequestError(
        f"the server has {num_live} requests and takes {max_live}; try again later",
        code="queue_full",
        status=429,
    )
