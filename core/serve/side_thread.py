"""A thread for what must hold up nothing: neither the event loop nor the end of the process.

Knows nothing of what it runs. Executors of the standard library are waited for when a program
ends, so that a job that never returns would keep the process.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any


class SideThread:
    """Runs functions one after the other, for one event loop. Starts with the first."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.num_jobs = 0  # that were given and have not returned, cancelled ones included

    def run(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """The result of a call, or what it raised. Cancelled before it began it is not called."""
        future = asyncio.get_running_loop().create_future()
        self.num_jobs += 1
        self._jobs.put((function, future))
        if self._thread.ident is None:
            self._thread.start()
        return future

    def _run(self) -> None:
        while True:
            function, future = self._jobs.get()
            result, error = None, None
            if not future.cancelled():
                try:
                    result = function()
                except BaseException as caught:  # SystemExit would end this thread silently
                    error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended
                future.get_loop().call_soon_threadsafe(self._tell, future, result, error)
            del function, future, result, error  # what is kept here while the next is waited for

    def _tell(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self.num_jobs -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            future.set_exception(error)
        else:
            future.set_exception(RuntimeError(repr(error)))
