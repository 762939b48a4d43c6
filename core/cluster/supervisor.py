"""Starts the processes of a node, watches them, and ends them: all or none. No torch, no HTTP.

One loop over status pipes, control pipes and signals (SIGCHLD among them); nothing is polled.
However this process ends, its children end too: they notice by themselves (`core.cluster.channel`).

    starting -> running -> draining -> stopping      after SIGTERM or SIGINT: exit status 0
    any of the first three -> failing -> killing     after a failure: exit status not 0
"""

import contextlib
import enum
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from core.cluster.channel import INTERNAL, failure_exit_code
from core.cluster.process import Child, ProcessSpec
from core.config import LaunchConfig
from core.errors import WorkerDied
from core.interfaces.control import ChildStatus, Drain, EngineDied, EngineReady, Ready

FAREWELL_S = 1.5  # for frontends to end their streams after a worker died
STOP_S = 1.0  # for processes to end by themselves after a failure, before they are killed
CLEAN_STOP_S = 5.0  # the same where nothing failed
SETTLE_S = 0.25  # in which a failure that may be the echo of another waits for its cause
KILL_S = 5.0  # for the kernel to end what was killed

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_ECHOES = (INTERNAL, WorkerDied.__name__)  # kinds of Failed that another process's death causes


class Stage(enum.Enum):
    """What the supervisor is waiting for."""

    STARTING = "every process is ready"
    RUNNING = "a signal or a failure"
    DRAINING = "the frontends finish what they accepted"
    FAILING = "the frontends tell their clients"
    STOPPING = "every process ends by itself"
    KILLING = "every process was ended"


class Supervisor:
    """The processes of one node. `run` once, from the main thread."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        launch: LaunchConfig,
        *,
        on_status: Callable[[str, ChildStatus], None],
        on_ready: Callable[[dict[str, Ready]], None],
        on_error: Callable[[str], None],
    ) -> None:
        """`on_status` gets every status with the process's name; `on_ready` what each said, once
        all are ready; `on_error` the text of what made the engine fail, once. They run inside
        the loop: keep them short."""
        self._specs = specs
        self._launch = launch
        self._on_status = on_status
        self._on_ready = on_ready
        self._on_error = on_error
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._stage = Stage.STARTING
        self._exit_code = 0
        self._deadline: float | None = None  # of the stage; in STARTING moved by every status
        self._settling = False
        self._told_frontends = False
        self._num_signals = 0
        self._gave_up = False

    def run(self) -> int:
        """Start everything, supervise until everything ended; returns the exit status.

        SIGTERM, SIGINT and SIGHUP drain: the frontends get `launch.shutdown_grace_s` for running
        requests. Before all processes are ready they end the start instead, and a second one
        ends everything at once, both with status 128 + signal.
        """
        with _signal_pipe() as pipe, self._selector:
            try:
                self._selector.register(pipe, selectors.EVENT_READ)
                for spec in self._specs:
                    child = Child(spec)
                    self._children.append(child)
                    child.pin()
                    self._selector.register(child.status_fd, selectors.EVENT_READ, child)
                self._deadline = time.monotonic() + self._launch.startup_timeout_s
                while self._living() and not self._gave_up:
                    self._step(pipe)
                return self._exit_code
            finally:
                self._close()

    # One turn of the loop.

    def _step(self, pipe: socket.socket) -> None:
        self._flush()
        timeout = None
        if self._deadline is not None:
            timeout = max(self._deadline - time.monotonic(), 0.0)
        numbers = b""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is pipe:
                numbers += pipe.recv(4096)
            elif isinstance(key.data, Child) and key.fd == key.data.status_fd:
                self._read(key.data)
        if signal.SIGCHLD in numbers:
            for child in self._children:
                if child.has_exited():
                    self._read(child)  # its last words, sent before its end
        self._judge()
        for number in numbers:
            if number != signal.SIGCHLD:
                self._on_signal(number)
        self._advance()

    def _flush(self) -> None:
        """Write to control pipes; wait for those that are full."""
        for child in self._children:
            fd = child.input_fd
            pending = child.flush()
            if fd is None:
                continue
            registered = fd in self._selector.get_map()
            if pending and not registered:
                self._selector.register(fd, selectors.EVENT_WRITE)
            elif registered and not pending:
                self._selector.unregister(fd)

    def _read(self, child: Child) -> None:
        """Take in what a child said."""
        for status in child.read():
            if self._stage is Stage.STARTING and not self._settling:
                self._deadline = time.monotonic() + self._launch.startup_timeout_s
            self._on_status(child.spec.name, status)
        if child.status_ended and child.status_fd in self._selector.get_map():
            self._selector.unregister(child.status_fd)

    def _advance(self) -> None:
        """Go to the next stage if what this one waits for happened, or took too long."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        frontends = [child for child in self._living() if not child.spec.is_worker]
        match self._stage:
            case Stage.STARTING:
                self._greet()
                if all(child.ready for child in self._children):
                    self._enter(Stage.RUNNING, None)
                    self._on_ready({c.spec.name: c.ready for c in self._children if c.ready})
                elif late and not self._settling:
                    self._fail_start(self._late_text())
            case Stage.DRAINING if not frontends and not self._settling:
                self._stop(CLEAN_STOP_S)
            case Stage.DRAINING if late and not self._settling:
                self._exit_code = 1
                self._on_error(
                    f"{frontends[0].label} did not finish {self._launch.shutdown_grace_s:g} s "
                    "(launch.shutdown_grace_s) after it was told to; it is killed"
                )
                self._kill()
            case Stage.FAILING if late or not frontends:
                self._kill()
            case Stage.STOPPING if late:
                if self._exit_code == 0:
                    names = ", ".join(child.label for child in self._living())
                    self._on_error(f"{names} did not end when told to; killed")
                self._kill()
            case Stage.KILLING if late:
                self._gave_up = True

    # Start.

    def _greet(self) -> None:
        """Tell the frontends that the workers are ready, once."""
        workers = [child for child in self._children if child.spec.is_worker]
        infos = [child.ready.info for child in workers if child.ready]
        if not self._told_frontends and infos and len(infos) == len(workers):
            self._told_frontends = True
            for child in self._children:
                if not child.spec.is_worker:
                    child.send(EngineReady(infos[0]))

    def _late_text(self) -> str:
        waiting = [
            f"{child.label}: last heard: {child.last_heard}"
            for child in self._children
            if not child.ready
        ]
        return (
            f"no process made progress for {self._launch.startup_timeout_s:g} s "
            "(launch.startup_timeout_s); waiting for\n  " + "\n  ".join(waiting)
        )

    def _fail_start(self, text: str, exit_code: int = 1) -> None:
        self._exit_code = exit_code
        self._on_error(text)
        self._stop(STOP_S)

    # Failure.

    def _judge(self) -> None:
        """Look for a process that failed or ended where it should not, and act on it.

        When one rank dies the others fail in their collectives; of several the likeliest cause
        is reported, and one that may be an echo is given a moment to be outdone.
        """
        if self._stage not in (Stage.STARTING, Stage.RUNNING, Stage.DRAINING):
            return
        suspects = [child for child in self._children if self._went_wrong(child)]
        if not suspects:
            return
        culprit = min(suspects, key=_suspicion)
        is_echo = culprit.failed is not None and culprit.failed.kind in _ECHOES
        if is_echo and len(self._living()) > 1:
            if not self._settling:
                self._settling = True
                self._deadline = time.monotonic() + SETTLE_S
            if self._deadline is not None and time.monotonic() < self._deadline:
                return
        self._fail(culprit)

    def _went_wrong(self, child: Child) -> bool:
        if child.failed is not None:
            return True
        finished = self._stage is Stage.DRAINING and not child.spec.is_worker
        return child.returncode is not None and not (finished and child.returncode == 0)

    def _fail(self, culprit: Child) -> None:
        brief, full = _cause(culprit)
        if self._stage is Stage.STARTING:
            kind = culprit.failed.kind if culprit.failed else INTERNAL
            self._fail_start(full, failure_exit_code(kind))
            return
        self._exit_code = 1
        self._on_error(full)
        for child in self._children:
            if child.spec.is_worker:
                child.kill()  # the others may hang in a collective with the dead one
            elif child is not culprit:
                child.send(EngineDied(brief))
        self._enter(Stage.FAILING, FAREWELL_S)

    # End.

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            self._exit_code = 128 + number
            self._kill()
        elif self._stage is Stage.STARTING:
            self._exit_code = 128 + number
            self._stop(STOP_S)
        elif self._stage is Stage.RUNNING:
            grace_s = self._launch.shutdown_grace_s
            for child in self._children:
                if not child.spec.is_worker:
                    child.send(Drain(grace_s))
            self._enter(Stage.DRAINING, grace_s + CLEAN_STOP_S)

    def _stop(self, limit_s: float) -> None:
        """Tell every process to end, and wait for it."""
        for child in self._children:
            child.end_input()
        self._enter(Stage.STOPPING, limit_s)

    def _enter(self, stage: Stage, limit_s: float | None) -> None:
        self._stage = stage
        self._settling = False
        self._deadline = None if limit_s is None else time.monotonic() + limit_s

    def _living(self) -> list[Child]:
        return [child for child in self._children if child.returncode is None]

    def _kill(self) -> None:
        for child in self._children:
            child.kill()
        self._enter(Stage.KILLING, KILL_S)

    def _close(self) -> None:
        self._kill()
        for child in self._children:
            if not child.close(0.0 if self._gave_up else KILL_S):
                self._on_error(f"{child.label} is stuck in the kernel and can't be killed")


def _suspicion(child: Child) -> int:
    """0: surely the cause of a failure ... 2: perhaps the echo of another's."""
    if child.failed is not None:
        return 2 if child.failed.kind in _ECHOES else 1
    return 0


def _cause(child: Child) -> tuple[str, str]:
    """Why a child failed: one line that may be shown to clients, and the text for the terminal."""
    if child.failed is None:
        text = f"{child.label} {child.exit_text()}"
        return text, f"{text}{child.exit_hint()}; the engine ends"
    if child.failed.kind == INTERNAL:
        return f"{child.label} failed", f"{child.label} failed:\n{child.failed.message}"
    return f"{child.label} failed: {child.failed.kind}", child.failed.message


@contextlib.contextmanager
def _signal_pipe() -> Iterator[socket.socket]:
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
