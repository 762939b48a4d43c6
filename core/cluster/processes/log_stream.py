"""Standard output and error that never stop the process which writes to them.

A disk that is full, a pipe nobody reads, a terminal that is gone: a print must neither raise nor
wait then, as it would end or stall a server that has nothing wrong with it. Lines go through a
bounded queue to a thread; those that can't be written are dropped and counted, and the next one
that can is preceded by their number. Knows nothing of what is logged.
"""

import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TextIO

MAX_QUEUED_BYTES = 1 << 20
Notice = Callable[[int, str], bytes]  # lines that were lost, why -> the line that says so
AGAIN_S = 5.0  # between two attempts to tell what was lost, where nothing else is written
TELL_S = 1.0  # at least between two calls of `on_dropped`
DRAIN_S = 0.5  # for what is queued to be written before the process ends


class LogWriter:
    """The queue and its thread, shared by both streams, so that their lines keep their order."""

    def __init__(self, on_dropped: Callable[[int], None] = lambda total: None) -> None:
        """`on_dropped` gets the number of lines dropped so far when it changed, from the thread."""
        self.dropped = 0  # lines, since the start; read from any thread
        self._on_dropped = on_dropped
        self._told, self._next_tell_s = 0, 0.0
        self._changed = threading.Condition()  # of what both sides use: the next four
        self._queue: deque[tuple[int, bytes]] = deque()
        self._queued_bytes = 0  # those that the thread is writing included
        self._losses: dict[int, _Loss] = {}  # by descriptor, not told there yet
        self._notices: dict[int, Notice] = {}
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="nodeweave-log", daemon=True)
        self._thread.start()

    def tell_losses(self, fd: int, notice: Notice) -> None:
        """Tell what a descriptor did not take in the form of what else is written to it."""
        self._notices[fd] = notice

    def write(self, fd: int, data: bytes) -> None:
        """Queue some text; drops it where too much is waiting. Never blocks."""
        with self._changed:
            if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
                self._lose(fd, data, "nobody reads it")
                return
            self._queue.append((fd, data))
            self._queued_bytes += len(data)
            self._changed.notify_all()

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until everything was written or dropped, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued_bytes == 0, timeout_s)

    def close(self) -> None:
        """The same, and end the thread where it is not stuck."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        ending = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending, self._pause_s())
                found = [self._queue.popleft()] if self._queue else []
                if not found:  # say what was lost, where there is room again
                    found = [(fd, b"") for fd in self._losses]
                    ending = self._ending
            for fd, data in found:
                self._write_or_lose(fd, data)
            self._tell()
            if ending:
                return

    def _write_or_lose(self, fd: int, data: bytes) -> None:
        with self._changed:
            before = self._losses.pop(fd, _Loss())
        notice = before.notice(self._notices.get(fd, _plain_notice))
        whole = notice + data
        written, reason = _write_all(fd, whole)
        with self._changed:
            self._queued_bytes -= len(data)
            self._changed.notify_all()
            if reason is None:
                return
            self._lose(fd, whole[max(written, len(notice)) :], reason)
            loss = self._losses[fd]
            loss.torn = before.torn if written == 0 else not whole[:written].endswith(b"\n")
            if written < len(notice):
                loss.lines += before.lines  # still untold

    def _lose(self, fd: int, data: bytes, reason: str) -> None:
        """With the lock."""
        lines = data.count(b"\n")
        self.dropped += lines
        loss = self._losses.setdefault(fd, _Loss())
        loss.lines += lines
        loss.reason = reason

    def _pause_s(self) -> float | None:
        if self.dropped != self._told:
            return max(self._next_tell_s - time.monotonic(), 0.0)
        return AGAIN_S if self._losses else None

    def _tell(self) -> None:
        if self.dropped == self._told or time.monotonic() < self._next_tell_s:
            return
        self._next_tell_s = time.monotonic() + TELL_S
        self._told = self.dropped
        self._on_dropped(self._told)


@dataclass(slots=True)
class _Loss:
    """What one descriptor did not take since it last took anything."""

    lines: int = 0
    reason: str = ""
    torn: bool = False  # the last thing that was written is no whole line

    def notice(self, form: Notice) -> bytes:
        """What is written before the next line; nothing where nothing was lost."""
        end = b"\n" if self.torn else b""
        return end + form(self.lines, self.reason) if self.lines else end


def _plain_notice(lines: int, reason: str) -> bytes:
    count = "1 line" if lines == 1 else f"{lines} lines"
    return f"{count} of this log could not be written: {reason}\n".encode()


def _write_all(fd: int, data: bytes) -> tuple[int, str | None]:
    """Bytes that were written, and why not all were."""
    written = 0
    while written < len(data):
        try:
            written += os.write(fd, data[written:])
        except BlockingIOError:  # another process made the pipe or terminal so
            select.select([], [fd], [], 1.0)
        except OSError as error:
            return written, error.strerror or str(error)
    return written, None


class LogStream(io.TextIOBase):
    """A text stream over a `LogWriter`."""

    def __init__(self, writer: LogWriter, fd: int) -> None:
        self._writer = writer
        self._fd = fd
        self._lock = threading.Lock()
        self._partial = ""  # of a line whose end was not written yet

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def write(self, text: str) -> int:
        with self._lock:
            whole, end, rest = (self._partial + text).rpartition("\n")
            self._partial = rest
            if end:
                self._queue(whole + end)
        return len(text)

    def flush(self) -> None:
        """Queue the beginning of a line as well (progress bars). Waits for nothing: the thread
        writes at once, and nobody may be held up by a pipe."""
        with self._lock:
            text, self._partial = self._partial, ""
            if text:
                self._queue(text)

    def drain(self) -> None:
        """Wait for a moment until it was written."""
        self._writer.drain()

    def _queue(self, text: str) -> None:
        self._writer.write(self._fd, text.encode("utf-8", "backslashreplace"))

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        try:
            return os.isatty(self._fd)
        except OSError:
            return False

    def fileno(self) -> int:
        return self._fd


@contextlib.contextmanager
def steady_output(on_dropped: Callable[[int], None] = lambda total: None) -> Iterator[LogWriter]:
    """While the context lasts `sys.stdout` and `sys.stderr` are streams that never fail. Those
    without a descriptor (of a test, of a notebook) stay as they are."""
    open_standard_descriptors()
    writer = LogWriter(on_dropped)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_steady(writer, stream) for stream in before)
    try:
        yield writer
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        writer.close()
        sys.stdout, sys.stderr = before


def exit_now(status: int) -> NoReturn:
    """End this process without clean-up, but for what it printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            if isinstance(stream, LogStream):
                stream.drain()
    os._exit(status)


def open_standard_descriptors() -> None:
    """Give /dev/null to standard descriptors that are closed (`2>&-`): else the next socket would
    be one of them, and get what libraries print."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def print_error(text: str) -> None:
    """To standard error, for a process that ends: its exit status stays its own even where the
    disk is full."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 # the interpreter flushes it at its end


def _steady(writer: LogWriter, stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w")
    try:
        fd = stream.fileno()
        stream.flush()
    except (OSError, ValueError, AttributeError):
        return stream
    return LogStream(writer, fd)  # type: ignore[return-value]
