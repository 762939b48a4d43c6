"""Signals as something a loop can wait for, besides sockets and pipes."""

import contextlib
import signal
import socket
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


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
