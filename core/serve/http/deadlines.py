"""The two timers of a connection: for what its client sends, and for what it takes.

Knows nothing of HTTP beyond the names of what may be waited for. A deadline counts from the
beginning of its state; what trickles in meanwhile does not move it.
"""

import asyncio
import enum
from collections.abc import Callable

from core.serve.http.limits import HttpLimits

LATE_S = 1.0  # a timer that fires later than this tells of a process that did not run


class Wait(enum.Enum):
    """What of a client's is waited for."""

    NOTHING = "nothing"  # it is the application's turn
    FIRST = "first"  # the first byte of the first request
    NEXT = "next"  # that of another one
    HEAD = "head"
    BODY = "body"
    REST = "rest"  # of a body whose request has been answered


class _Timer:
    """Calls `_on_time` when its seconds are over. Only those count in which this process ran: after
    a pause (SIGSTOP, a container's freezer) what clients sent meanwhile is read first."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = 0.0
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def run(self, seconds: float) -> None:
        self.stop()
        self._seconds = seconds
        self._handle = self._loop.call_later(seconds, self._fire, self._loop.time() + seconds)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self, due_s: float) -> None:
        self._handle = None
        late_s = self._loop.time() - due_s
        if late_s > LATE_S:
            self.run(min(late_s, self._seconds))
        else:
            self._on_time()

    def _on_time(self) -> None:
        raise AssertionError("of a subclass")


class InputTimer(_Timer):
    """Runs in every state but NOTHING."""

    def __init__(self, limits: HttpLimits, on_deadline: Callable[[Wait, float], None]) -> None:
        """`on_deadline` gets the state and its seconds."""
        super().__init__()
        self._on_deadline = on_deadline
        self._seconds_of = {
            Wait.FIRST: limits.head_s,
            Wait.NEXT: limits.idle_s,
            Wait.HEAD: limits.head_s,
            Wait.BODY: limits.body_s,
            Wait.REST: limits.discard_s,
        }
        self._state = (Wait.NOTHING, 0)

    def settle(self, wait: Wait, number: int) -> None:
        """The connection is in this state, of its request of this number; starts anew only where
        that is another state than before."""
        state = (wait, number)
        if state == self._state and self.running:
            return
        self.stop()
        self._state = state
        if wait is not Wait.NOTHING:
            self.run(self._seconds_of[wait])

    def _on_time(self) -> None:
        wait = self._state[0]
        self._on_deadline(wait, self._seconds_of[wait])


class OutputTimer(_Timer):
    """Runs while bytes wait for a client to take them, and while a connection closes."""

    def __init__(
        self, stall_s: float, unsent_bytes: Callable[[], int], on_stall: Callable[[], None]
    ) -> None:
        """`on_stall` is called where the client took nothing in time, or all there was."""
        super().__init__()
        self._stall_s = stall_s
        self._unsent_bytes = unsent_bytes
        self._on_stall = on_stall
        self._before = 0  # unsent bytes when it was started

    def start(self, seconds: float) -> None:
        self._before = self._unsent_bytes()
        self.run(seconds)

    def _on_time(self) -> None:
        if 0 < self._unsent_bytes() < self._before:
            self.start(self._stall_s)
        else:
            self._on_stall()
