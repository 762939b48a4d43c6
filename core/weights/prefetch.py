"""Loads what a model is going to take, in its order, some of it ahead and several at a time.

Reads release the interpreter's lock, so threads do. What is loaded but not taken yet is bounded.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from core.interfaces.weights import LinearWeight
from core.weights.manifest import TensorRequest

NUM_THREADS = 4
# Loaded (or being loaded) and not taken: more would hide no longer waits.
MAX_AHEAD_BYTES = 1 << 28

Load = Callable[[TensorRequest], LinearWeight]


class Prefetcher:
    """The results of `load` for `manifest`, asked for by one thread in about that order."""

    def __init__(
        self,
        manifest: Sequence[TensorRequest],
        load: Load,
        *,
        num_threads: int = NUM_THREADS,
        max_ahead_bytes: int = MAX_AHEAD_BYTES,
    ) -> None:
        self._load = load
        self._waiting = deque(manifest)
        self._num_waiting = Counter(manifest)
        self._max_ahead_bytes = max_ahead_bytes
        self._ahead_bytes = 0
        self._ahead: dict[TensorRequest, deque[Future[LinearWeight]]] = {}
        self._early: Counter[TensorRequest] = Counter()  # asked for before their turn
        self._pool = ThreadPoolExecutor(num_threads, "load-weights") if manifest else None

    def get(self, take: TensorRequest) -> LinearWeight:
        """The loaded part; whoever gets it owns it. The first call begins to read ahead. Raises
        what `load` raised, and ends the threads then."""
        self._refill()
        futures = self._ahead.get(take)
        try:
            if not futures:
                if self._num_waiting[take] > self._early[take]:
                    self._early[take] += 1
                return self._load(take)
            loaded = futures.popleft().result()
        except BaseException:
            self.close()
            raise
        if not futures:
            del self._ahead[take]
        self._ahead_bytes -= take.num_local_bytes
        self._refill()
        return loaded

    @property
    def num_left(self) -> int:
        """How many of `manifest` nobody asked for."""
        ahead = sum(map(len, self._ahead.values()))
        return len(self._waiting) - self._early.total() + ahead

    def close(self) -> None:
        """Forget what nobody asked for and end the threads."""
        self._waiting.clear()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _refill(self) -> None:
        """Begin to load as much as may be ahead; at least one, however large."""
        while self._waiting and self._pool is not None:
            take = self._waiting[0]
            if self._early[take]:
                self._early[take] -= 1
            elif self._ahead and self._ahead_bytes + take.num_local_bytes > self._max_ahead_bytes:
                return
            else:
                self._ahead_bytes += take.num_local_bytes
                future = self._pool.submit(self._load, take)
                self._ahead.setdefault(take, deque()).append(future)
            self._waiting.popleft()
            self._num_waiting[take] -= 1
