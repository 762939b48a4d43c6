"""Starts the processes of a node, watches them, and ends them: all or none. No torch, no HTTP.

One loop over status pipes, control pipes and signals (SIGCHLD among them); polled is only what
the kernel has no event for, whether a process moves (`core.cluster.processes.watchdog`).
However this process ends, its children end too: they notice by themselves
(`core.cluster.processes.channel`).

    starting -> running -> draining -> stopping      after SIGTERM or SIGINT: exit status 0
    any of the first three -> failing -> killing     after a failure: exit status not 0

Of several nodes each has a supervisor of its own, and a `core.cluster.processes.group.Group`
through which they tell each other. Node 0 decides when all are ready and when all stop; on the
other nodes "leaving" takes the place of "draining". A failure anywhere is everyone's.
"""

import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from core.cluster.processes.blame import cause, likeliest, patience_s
from core.cluster.processes.channel import INTERNAL, failure_exit_code
from core.cluster.processes.group import (
    DrainAsked,
    Ended,
    Group,
    GroupEvent,
    Heard,
    SingleNode,
    Stopped,
)
from core.cluster.processes.process import Child, ProcessSpec
from core.cluster.processes.readiness import Readiness
from core.cluster.processes.signals import signal_pipe
from core.cluster.processes.stages import CLEAN_STOP_S, FAREWELL_S, KILL_S, LIVE, STOP_S, Stage
from core.cluster.processes.watchdog import Watchdog
from core.interfaces.control import ChildStatus, Drain, EngineDied, LinesDropped, Ready
from core.settings.config import LaunchConfig

ENDED_BY_SIGNAL = "the server was told to end at once"


class Supervisor:
    """The processes of one node. `run` once, from the main thread unless `signals` are given."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        launch: LaunchConfig,
        *,
        on_status: Callable[[str, ChildStatus], None],
        on_ready: Callable[[dict[str, Ready]], None],
        on_error: Callable[[str], None],
        on_waiting: Callable[[Sequence[str]], None] = lambda lines: None,
        dropped_lines: Callable[[], int] = lambda: 0,
        group: Group | None = None,
        signals: Callable[[], AbstractContextManager[socket.socket]] = signal_pipe,
    ) -> None:
        """`on_status` gets every status with the process's name; `on_ready` what each said, once
        all are ready; `on_error` the text of what made the engine fail, once; `on_waiting` now
        and then whom a start waits for. They run inside the loop: keep them short. `dropped_lines`
        tells how many lines of this process's own log were dropped so far. `signals` opens what
        the numbers of signals are read from; those of the process, unless given.

        On node 0 of several, statuses and what was said are those of all nodes' workers.
        """
        self._specs = specs
        self._launch = launch
        self._on_status = on_status
        self._on_ready = on_ready
        self._on_error = on_error
        self._on_waiting = on_waiting
        self._own_dropped_lines = dropped_lines
        self._told_dropped_lines = 0
        self._group = group or SingleNode()
        self._signals = signals
        self._leads = self._group.site.node_rank == 0
        self._watchdog = Watchdog(launch.step_timeout_s)
        self._children: list[Child] = []
        self._readiness = Readiness(self._children, self._group)
        self._selector = selectors.DefaultSelector()
        self._stage = Stage.STARTING
        self._exit_code = 0
        self._deadline: float | None = None  # of the stage; in STARTING moved by every status
        self._suspected_s: float | None = None  # when a process was first seen to go wrong
        self._num_signals = 0
        self._gave_up = False

    def run(self) -> int:
        """Start everything, supervise until everything ended; returns the exit status.

        SIGTERM, SIGINT and SIGHUP, on whichever node, drain: the frontends get
        `launch.shutdown_grace_s` for running requests. Before all processes are ready they end the
        start instead. A second one ends everything at once, streams with an error event. Both give
        status 128 + signal.
        """
        with self._signals() as pipe, self._selector:
            try:
                self._selector.register(pipe, selectors.EVENT_READ)
                if self._group.fd is not None:
                    self._selector.register(self._group.fd, selectors.EVENT_READ)
                for spec in self._specs:
                    child = Child(spec)
                    self._children.append(child)
                    child.pin()
                    self._selector.register(child.status_fd, selectors.EVENT_READ, child)
                self._moved()
                # Whose processes all ended still waits for a likelier cause, and says which it was.
                while (self._living() or self._suspected_s is not None) and not self._gave_up:
                    self._step(pipe)
                return self._exit_code
            finally:
                self._close()

    # One turn of the loop.

    def _step(self, pipe: socket.socket) -> None:
        self._flush()
        timeout = self._watchdog.pause_s
        if self._deadline is not None:
            timeout = min(timeout, max(self._deadline - time.monotonic(), 0.0))
        numbers = b""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is pipe:
                numbers += pipe.recv(4096)
            elif isinstance(key.data, Child) and key.fd == key.data.status_fd:
                self._read(key.data)
        for child in self._children:
            # A supervisor in a thread gets no SIGCHLD; it sees the status pipe's end.
            if (signal.SIGCHLD in numbers or child.status_ended) and child.has_exited():
                self._read(child)  # its last words, sent before its end
        paused_s = self._watchdog.look(self._children)
        if self._deadline is not None:
            self._deadline += paused_s  # the children were paused too, or were not heard
        if self._suspected_s is not None:
            self._suspected_s += paused_s
        self._tell_dropped_lines()
        for event in self._group.events():
            self._on_group_event(event)
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
            self._moved()
            self._on_status(child.spec.name, status)
            self._group.said(child.spec.name, status)
        if child.status_ended and child.status_fd in self._selector.get_map():
            self._selector.unregister(child.status_fd)

    def _tell_dropped_lines(self) -> None:
        """Have the frontends count what could not be logged on this node."""
        total = self._own_dropped_lines() + sum(
            child.dropped_lines for child in self._children if child.spec.is_worker
        )
        if total == self._told_dropped_lines:
            return
        self._told_dropped_lines = total
        for child in self._children:
            if not child.spec.is_worker:
                child.send(LinesDropped(total))

    def _moved(self) -> None:
        """A start goes on. Node 0 keeps the deadline for all nodes."""
        if self._stage is Stage.STARTING and self._suspected_s is None and self._leads:
            self._deadline = time.monotonic() + self._launch.startup_timeout_s

    def _advance(self) -> None:
        """Go to the next stage if what this one waits for happened, or took too long."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        frontends = [child for child in self._living() if not child.spec.is_worker]
        match self._stage:
            case Stage.STARTING:
                self._readiness.greet()
                if self._readiness.complete:
                    self._enter(Stage.RUNNING, None)
                    self._on_ready(self._readiness.infos())
                elif late and self._suspected_s is None:
                    self._fail_start(self._late_text(), here=True)
                else:
                    self._on_waiting(self._readiness.waiting_for())
            case Stage.DRAINING if not frontends and self._suspected_s is None:
                self._group.stop()
                self._stop(CLEAN_STOP_S)
            case Stage.LEAVING if late:
                text = (
                    f"node {self._group.site.node_rank} asked node 0 to end, which did not answer"
                )
                self._exit_code = 1
                self._on_error(text)
                self._group.failed(text, text, 1)
                self._kill()
            case Stage.DRAINING if late and self._suspected_s is None:
                text = (
                    f"{frontends[0].label} did not finish {self._launch.shutdown_grace_s:g} s "
                    "(launch.shutdown_grace_s) after it was told to; it is killed"
                )
                self._exit_code = 1
                self._on_error(text)
                self._group.failed(text, text, 1)
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

    def _late_text(self) -> str:
        return (
            f"no process made progress for {self._launch.startup_timeout_s:g} s "
            "(launch.startup_timeout_s); waiting for\n  "
            + "\n  ".join(self._readiness.waiting_for())
        )

    def _fail_start(self, text: str, exit_code: int = 1, *, here: bool) -> None:
        """End a start; `here`: the other nodes don't know yet."""
        self._exit_code = exit_code
        self._on_error(text)
        if here:
            self._group.failed(text, "the start failed", exit_code)
        self._stop(STOP_S)

    # Failure.

    def _judge(self) -> None:
        """Look for a process that failed or ended where it should not, and act on it.

        When one rank dies the others fail in their collectives; of several the likeliest cause
        is reported, and one that may be an echo is given a moment to be outdone.
        """
        if self._stage not in LIVE:
            return
        suspects = [child for child in self._children if self._went_wrong(child)]
        if not suspects:
            return
        for child in self._living():
            child.look_whether_ending()
        culprit = likeliest([child for child in self._children if self._went_wrong(child)])
        now = time.monotonic()
        if self._suspected_s is None:
            self._suspected_s = now
        self._deadline = self._suspected_s + patience_s(culprit)
        if now >= self._deadline:
            self._fail(culprit)

    def _went_wrong(self, child: Child) -> bool:
        if child.failed is not None or child.frozen is not None:
            return True
        finished = self._stage is Stage.DRAINING and not child.spec.is_worker
        return child.is_ending and not (finished and child.ended_as in (0, None))

    def _fail(self, culprit: Child) -> None:
        brief, full = cause(culprit, self._children)
        if self._stage is Stage.STARTING:
            kind = culprit.failed.kind if culprit.failed else INTERNAL
            self._fail_start(full, failure_exit_code(kind), here=True)
            return
        self._group.failed(full, brief, 1)
        self._end(full, brief, culprit)

    def _end(self, text: str, brief: str, culprit: Child | None, exit_code: int = 1) -> None:
        """The engine fails while it runs: workers end at once, frontends tell their clients."""
        self._exit_code = exit_code
        self._on_error(text)
        self._abandon(brief, culprit)

    def _abandon(self, brief: str, culprit: Child | None) -> None:
        """Compute nothing more; frontends end every stream with an error that says `brief`."""
        for child in self._children:
            if child.spec.is_worker:
                child.kill()  # the others may hang in a collective with a dead one
            elif child is not culprit:
                child.send(EngineDied(brief))
        self._enter(Stage.FAILING, FAREWELL_S)

    def _on_group_event(self, event: GroupEvent) -> None:
        match event:
            case Heard(process, status):
                self._moved()
                self._on_status(process, status)
            case Ended(text, brief, exit_code) if self._stage in LIVE:
                if self._stage is Stage.STARTING:
                    self._fail_start(text, exit_code, here=False)
                else:
                    self._end(text, brief, None, exit_code)
            case Stopped() if self._stage in LIVE:
                self._stop(CLEAN_STOP_S)
            case DrainAsked(by) if self._stage is Stage.STARTING:
                self._fail_start(
                    f"{by} before the engine was ready", 128 + signal.SIGTERM, here=True
                )
            case DrainAsked() if self._stage is Stage.RUNNING:
                self._drain()

    # End.

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            self._end_at_once(number)
        elif self._stage is Stage.STARTING:
            self._exit_code = 128 + number
            self._stop(STOP_S)
            self._tell_signal(number)
        elif self._stage is Stage.RUNNING:
            if self._group.ask_to_drain(signal.Signals(number).name):
                self._enter(Stage.LEAVING, self._launch.shutdown_grace_s + 2 * CLEAN_STOP_S)
            else:
                self._drain()

    def _end_at_once(self, number: int) -> None:
        """Asked twice: nothing is finished, but clients are still told. A third signal, or one in a
        stage that ends anyway, spares nobody."""
        self._exit_code = 128 + number
        if self._num_signals == 2 and self._stage in (Stage.DRAINING, Stage.LEAVING):
            self._abandon(ENDED_BY_SIGNAL, None)
        else:
            self._kill()
        self._tell_signal(number)

    def _tell_signal(self, number: int) -> None:
        node = f"node {self._group.site.node_rank}"
        text = f"{node} was told to end at once, by {signal.Signals(number).name}"
        self._group.failed(text, f"{node} was stopped", 128 + number)

    def _drain(self) -> None:
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
        self._suspected_s = None
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
