"""Signals as something a loop can wait for, besides sockets and pipes."""

import contextlib
import signal
import socket
from collections.abc import Iterator

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNALS = (*_ENDING, signal.SIGCHLD)


@contextlib.contextmanager
def signal_pipe() -> Iterator[socket.socket]:
    """A socket that signal numbers can be read from, as bytes, while the context lasts.

    A SIGHUP that was ignored (nohup) stays ignored.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        handled = [
            s for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN or s != signal.SIGHUP
        ]
        before = {number: signal.signal(number, lambda *_: None) for number in handled}
        fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)


class OwnSignals:
    """Signals that a program sends to a supervisor inside it by hand: in a thread, where the
    process's own belong to the program. Nothing arrives by itself, SIGCHLD neither."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)

    def send(self, number: signal.Signals) -> None:
        """From any thread; after the pipe was closed it does nothing."""
        with contextlib.suppress(OSError):
            self._writer.send(bytes([number]))

    @contextlib.contextmanager
    def pipe(self) -> Iterator[socket.socket]:
        """What `signal_pipe` gives, once."""
        with self._reader, self._writer:
            yield self._reader


def leave_signals_to_parent() -> None:
    """In a child: a signal that asks to end does nothing, as the parent decides for all.

    systemd, Slurm and `kill` of a whole group send it to every process; a worker that obeyed would
    take the requests with it that its parent lets finish. A handler of Python's, not SIG_IGN, which
    programs that this process starts would inherit.
    """
    for number in _ENDING:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
