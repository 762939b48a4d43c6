"""A worker of the text service: its socket, and the job that it does.

Knows its pool by a Protocol. Starts and ends no process, and knows nothing of what a job asks.
"""

import asyncio
from typing import Protocol, cast

from core.serve.text.process import LEAVING, LENGTH

SMALL_BYTES = 64 * 1024  # of a job; larger ones leave a worker free for those


class Job:
    """A job and who waits for it."""

    __slots__ = ("began", "done", "frame", "is_large", "timer", "worker")

    def __init__(self, frame: bytes, done: "asyncio.Future[bytes]") -> None:
        self.frame = frame
        self.done = done
        self.is_large = len(frame) > SMALL_BYTES
        self.worker: Worker | None = None
        self.began = 0.0  # by the event loop's clock
        self.timer: asyncio.TimerHandle | None = None

    def finish(self, reply: bytes) -> None:
        self.release()
        if not self.done.done():
            self.done.set_result(reply)

    def fail(self, error: Exception) -> None:
        self.release()
        if not self.done.done():
            self.done.set_exception(error)

    def release(self) -> None:
        """Hold nothing any more that holds it."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.worker = None


class Pool(Protocol):
    """Who has the workers."""

    def dispatch(self) -> None:
        """A worker has become idle."""
        ...

    def retire(self, worker: "Worker") -> None:
        """It got no further job."""
        ...

    def look_at_end(self, worker: "Worker") -> None:
        """Its socket is closed."""
        ...


class Worker(asyncio.Protocol):
    """One worker's socket. `job` is what it does now."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.number = number
        self.job: Job | None = None
        self.leaving = False  # it takes no further job
        self.lost = False  # its socket is closed
        self.signal: int | None = None  # that ended it; 0: it ended by itself; None: not known
        self._pool = pool
        self._transport: asyncio.WriteTransport | None = None
        self._pieces: list[bytes] = []
        self._missing = LENGTH.size
        self._in_head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's has no such base

    @property
    def is_idle(self) -> bool:
        """Whether it can be given a job. A socket may be closed before we are told."""
        assert self._transport is not None
        return self.job is None and not self.leaving and not self._transport.is_closing()

    def begin(self, job: Job) -> None:
        self.job, job.worker = job, self
        assert self._transport is not None
        self._transport.writelines((LENGTH.pack(len(job.frame)), job.frame))
        job.frame = b""  # up to 8 MiB, which the socket's buffer holds as long as it has to

    def data_received(self, data: bytes) -> None:
        while data:
            piece, data = data[: self._missing], data[self._missing :]
            self._pieces.append(piece)
            self._missing -= len(piece)
            if self._missing:
                return
            whole = b"".join(self._pieces)
            self._pieces.clear()
            if self._in_head:
                self._missing = LENGTH.unpack(whole)[0]
            else:
                self._missing = LENGTH.size
                job, self.job = self.job, None
                self.leaving = bool(whole[0] & LEAVING)
                if job is not None:
                    job.finish(whole)
                self._pool.dispatch()
                if self.job is None:
                    self._pool.retire(self)
            self._in_head = not self._in_head

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self._pool.look_at_end(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
