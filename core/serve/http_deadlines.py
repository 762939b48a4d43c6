"""The two timers of a connection: for what its client sends, and for what it takes.

Knows nothing of HTTP beyond the names of what may be waited for. A deadline counts from the
beginning of its state; what trickles in meanwhile does not move it.
"""

import asyncio
import enum
from collections.abc import Callable

from core.serve.http_limits import HttpLimits


class Wait(enum.Enum):
    """What of a client's is waited for."""

    NOTHING = "nothing"  # it is the application's turn
    FIRST = "first"  # the first byte of the first request
    NEXT = "next"  # that of another one
    HEAD = "head"
    BODY = "body"
    REST = "rest"  # of a body whose request has been answered


class InputTimer:
    """Runs in every state but NOTHING."""

    def __init__(self, limits: HttpLimits, on_deadline: Callable[[Wait, float], None]) -> None:
        """`on_deadline` gets the state and its seconds."""
        self._loop = asyncio.get_running_loop()
        self._on_deadline = on_deadline
        self._seconds = {
            Wait.FIRST: limits.head_s,
            Wait.NEXT: limits.idle_s,
            Wait.HEAD: limits.head_s,
            Wait.BODY: limits.body_s,
            Wait.REST: limits.discard_s,
        }
        self._state = (Wait.NOTHING, 0)
        self._handle: asyncio.TimerHandle | None = None

    def settle(self, wait: Wait, number: int) -> None:
        """The connection is in this state, of its request of this number; starts anew only where
        that is another state than before."""
        state = (wait, number)
        if state == self._state and self._handle is not None:
            return
        self.stop()
        self._state = state
        if wait is not Wait.NOTHING:
            self._handle = self._loop.call_later(self._seconds[wait], self._fire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        wait = self._state[0]
        self._on_deadline(wait, self._seconds[wait])


class OutputTimer:
    """Runs while bytes wait for a client to take them, and while a connection closes."""

    def __init__(
        self, stall_s: float, unsent_bytes: Callable[[], int], on_stall: Callable[[], None]
    ) -> None:
        """`on_stall` is called where the client took nothing in time, or all there was."""
        self._loop = asyncio.get_running_loop()
        self._stall_s = stall_s
        self._unsent_bytes = unsent_bytes
        self._on_stall = on_stall
        self._before = 0  # unsent bytes when it was started
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        self.stop()
        self._before = self._unsent_bytes()
        self._handle = self._loop.call_later(seconds, self._fire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        if 0 < self._unsent_bytes() < self._before:
            self.start(self._stall_s)
        else:
            self._handle = None
            self._on_stall()
