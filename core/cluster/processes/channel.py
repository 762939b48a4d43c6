"""A child process's line to the supervisor that started it; knows nothing of what the child does.

The supervisor writes JSON lines to the child's standard input (the first is the boot line, the
rest are `ParentControl`) and reads `ChildStatus` lines from a pipe whose descriptor it names in
the environment. The end of standard input means that the parent wants this child gone, or is
gone itself.

    channel = Channel.open()
    exit_with_parent()
    try:
        boot = msgspec.json.decode(channel.boot_line(), type=...)
        ...
        channel.listen(handler)
        channel.send(Ready(info))
    except Exception as error:
        sys.exit(channel.report_failure(error))
"""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import BinaryIO

import msgspec

from core import errors
from core.cluster.processes.log_stream import exit_now
from core.interfaces.control import ChildStatus, Failed, Heartbeat, ParentControl

STATUS_FD_VARIABLE = "NODEWEAVE_STATUS_FD"
PARENT_PID_VARIABLE = "NODEWEAVE_PARENT_PID"
BEAT_S = 0.25
INTERNAL = "internal"  # Failed.kind of errors that are not in core.errors

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Channel:
    """Both directions between this process and its supervisor."""

    def __init__(self, control: BinaryIO, status_fd: int) -> None:
        """Take over `control` (read only here from now on) and `status_fd` (written only here)."""
        self._control = control
        self._status_fd = status_fd
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()

    @classmethod
    def open(cls) -> "Channel":
        """The channel of this process. Call once, early: standard input becomes /dev/null.

        Neither pipe is passed on to processes that this one starts, so that their lives don't
        hide its end. Raises ConfigError where no supervisor started this process.
        """
        fd_text = os.environ.pop(STATUS_FD_VARIABLE, "")
        if not fd_text.isdigit():
            raise errors.ConfigError(
                "this process is started by `python -m core.run`, not by hand: "
                f"{STATUS_FD_VARIABLE} is not set"
            )
        status_fd = int(fd_text)
        os.set_inheritable(status_fd, False)
        control_fd = os.dup(0)  # not inheritable
        null_fd = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null_fd, 0)
        os.close(null_fd)
        return cls(os.fdopen(control_fd, "rb"), status_fd)

    def boot_line(self) -> bytes:
        """The first line, which says what this process is; blocks until it came.

        Call before `listen`. Exits the process where the parent is gone before it wrote it.
        """
        line = self._control.readline()
        if not line.endswith(b"\n"):
            sys.exit(1)
        return line[:-1]

    def send(self, status: ChildStatus) -> None:
        """Tell the parent; from any thread. A parent that is gone is no error here: the control
        stream ends then too, and whoever listens to it decides."""
        line = memoryview(self._encoder.encode(status) + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._status_fd, line) :]
            except BrokenPipeError:
                return

    def heartbeat(self, heartbeat: Callable[[], Heartbeat]) -> None:
        """From now on tell the parent several times a second, from a daemon thread, that this
        process lives and how far it is."""

        def heartbeat_forever() -> None:
            while True:
                self.send(heartbeat())
                time.sleep(BEAT_S)

        threading.Thread(target=heartbeat_forever, name="nodeweave-heartbeat", daemon=True).start()

    def listen(self, handler: Callable[[ParentControl | None], None]) -> None:
        """Call `handler` for every message from a daemon thread, and with None at the end.

        An exception in the handler ends the process with status 1: nobody could stop it after.
        """
        threading.Thread(
            target=self._read, args=(handler,), name="nodeweave-control", daemon=True
        ).start()

    def exit_at_end(self, before: Callable[[], None] = lambda: None) -> None:
        """`listen` for a process that is told only one thing: to end. It exits with status 0 once
        `before` returned, without other clean-up, whatever its other threads do (even inside a
        collective)."""

        def handler(message: ParentControl | None) -> None:
            if message is None:
                before()
                exit_now(0)

        self.listen(handler)

    def report_failure(self, error: BaseException, blames: Sequence[str] = ()) -> int:
        """Tell the parent why this process ends; returns the exit status to end with.

        The parent prints it, once for all processes: print nothing here. Errors that are not
        meant for users carry their traceback. `blames`: see Failed.
        """
        kind = failure_kind(error)
        text = str(error)
        if kind == INTERNAL:
            text = "".join(traceback.format_exception(error)).rstrip()
        self.send(Failed(kind, text, list(blames)))
        return failure_exit_code(kind)

    def _read(self, handler: Callable[[ParentControl | None], None]) -> None:
        decoder = msgspec.json.Decoder(ParentControl)
        try:
            for line in self._control:
                handler(decoder.decode(line))
            handler(None)
        except BaseException as error:
            self.report_failure(error)
            exit_now(1)


def failure_kind(error: BaseException) -> str:
    """The name of the class in core.errors that `error` is an instance of, or "internal"."""
    for cls in type(error).__mro__:
        if cls.__module__ == errors.__name__:
            return cls.__name__
    return INTERNAL


def failure_exit_code(kind: str) -> int:
    """The exit status that belongs to a `Failed.kind`."""
    cls = getattr(errors, kind, None)
    return cls.exit_code if isinstance(cls, type) and hasattr(cls, "exit_code") else 1


def exit_with_parent() -> None:
    """Have the kernel kill this process when the supervisor dies, however that happens.

    Linux only; elsewhere the end of the control stream has to do. The signal is bound to the
    parent's thread that started this process: the supervisor starts children from its main
    thread.
    """
    parent_text = os.environ.pop(PARENT_PID_VARIABLE, "")
    _set_parent_death_signal(signal.SIGKILL)
    if parent_text.isdigit() and os.getppid() != int(parent_text):
        os._exit(1)  # it died before the signal was asked for


def outlive_parent() -> None:
    """Take that back: for a process that hears of the parent's end by that of the control stream,
    has clients to tell, and then sees to its own end."""
    _set_parent_death_signal(0)


def _set_parent_death_signal(number: int) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        failure = ctypes.get_errno()
        raise OSError(failure, f"prctl(PR_SET_PDEATHSIG): {os.strerror(failure)}")
