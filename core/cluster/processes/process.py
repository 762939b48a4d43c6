"""One child process as its supervisor sees it: pipes, what it said, how it ended.

Decides nothing and never blocks; `core.cluster.processes.supervisor` does the former,
`core.cluster.processes.channel` is the other end of the pipes.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from core.cluster.processes.channel import INTERNAL, PARENT_PID_VARIABLE, STATUS_FD_VARIABLE
from core.cluster.processes.motion import Motion
from core.cluster.processes.process_stat import end_under_way
from core.interfaces.control import (
    ChildStatus,
    Failed,
    Heartbeat,
    LinesDropped,
    ParentControl,
    Progress,
    Ready,
    StartPhase,
)

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A process to start: `python -m module`, with `boot` as its first line of input."""

    name: str  # as errors call it: "worker 0", "frontend"
    module: str
    boot: bytes  # one line of JSON, without its end
    env: Mapping[str, str] = field(default_factory=dict)  # added to this process's environment
    is_worker: bool  # else a frontend
    cpus: tuple[int, ...] | None = None  # it may run on these only; None: anywhere
    node: int | None = None  # where there are several


class Child:
    """A started process. `failed`, `ready`, `motion`, `returncode` and `is_ending` are set as it
    says and does so, `frozen` by `core.cluster.processes.watchdog`."""

    def __init__(self, spec: ProcessSpec) -> None:
        """Start it, in a session of its own: a Ctrl-C in the terminal does not reach it."""
        assert b"\n" not in spec.boot
        self.spec = spec
        self.failed: Failed | None = None
        self.ready: Ready | None = None
        self.frozen: str | None = None  # how, in words
        self.returncode: int | None = None  # negative: killed by that signal
        self.is_ending = False  # the kernel is at it, or was: it closed its end of the status pipe
        self.ended_as: int | None = None  # `returncode`, maybe known before it was reaped
        self.wrong_s = math.inf  # when it failed or began to end
        self.heartbeat_s: float | None = None  # when the last heartbeat came
        self.motion = Motion(time.monotonic())
        self.was_heard = False
        self.last_heard = "nothing yet"
        self.dropped_lines = 0  # of its log, so far
        self.status_ended = False
        self._decoder = msgspec.json.Decoder(ChildStatus)
        self._partial = b""  # of the next status line
        self._unsent = bytearray(spec.boot + b"\n")
        self._closing = False
        self.status_fd, write_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", spec.module],
                stdin=subprocess.PIPE,
                pass_fds=(write_fd,),
                env={
                    **os.environ,
                    **spec.env,
                    STATUS_FD_VARIABLE: str(write_fd),
                    PARENT_PID_VARIABLE: str(os.getpid()),
                },
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(self.status_fd)
            raise
        finally:
            os.close(write_fd)
        assert self._process.stdin is not None
        self.input_fd: int | None = self._process.stdin.fileno()
        os.set_blocking(self.status_fd, False)
        os.set_blocking(self.input_fd, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def label(self) -> str:
        """For people: name, node and process id."""
        node = "" if self.spec.node is None else f" on node {self.spec.node}"
        return f"{self.spec.name}{node} (pid {self.pid})"

    def pin(self) -> None:
        """Bind it to its CPUs; call before it starts threads, which inherit that."""
        if self.spec.cpus is not None:
            os.sched_setaffinity(self.pid, self.spec.cpus)

    def send(self, message: ParentControl) -> None:
        """Queue a message; `flush` writes it."""
        self._unsent += msgspec.json.encode(message) + b"\n"

    def end_input(self) -> None:
        """Close the child's input, which tells it to end, after what is queued was written."""
        self._closing = True

    def flush(self) -> bool:
        """Write what the pipe takes now; whether something is left to write."""
        if self.input_fd is None:
            return False
        try:
            while self._unsent:
                del self._unsent[: os.write(self.input_fd, self._unsent)]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it reads no more; its exit tells why
            self._unsent.clear()
            self._closing = True
        if self._closing:
            self._close_input()
        return False

    def read(self) -> list[ChildStatus]:
        """Statuses that came since the last call; sets `status_ended` after the last one."""
        try:
            while data := os.read(self.status_fd, _READ_BYTES):
                self._partial += data
            self.status_ended = True
            self._begin_end()
        except BlockingIOError:
            pass
        *lines, self._partial = self._partial.split(b"\n")
        return [self._remember(line) for line in lines]

    def has_exited(self) -> bool:
        """Whether it ended, seen now for the first time. Whatever it started ends with it."""
        if self.returncode is not None:
            return False
        # Look before reaping: while it is a zombie nobody else can get its process group's id.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._kill_group()
        self.returncode = self.ended_as = self._process.wait()
        self._begin_end()
        return True

    def look_whether_ending(self) -> None:
        """Ask the kernel whether it is at ending it, which only that can tell until it is done."""
        if self.returncode is None:
            is_ending, code = end_under_way(self.pid)
            if is_ending:
                self.ended_as = code
                self._begin_end()

    def kill(self) -> None:
        """SIGKILL to it and all it started, unless it was reaped before."""
        if self.returncode is None:
            self._kill_group()

    def close(self, timeout_s: float) -> bool:
        """Kill it, wait for it, close both pipes; False where it outlives even that."""
        self.kill()
        try:
            self.returncode = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self._close_input()
            os.close(self.status_fd)
        return True

    def forgive(self, paused_s: float) -> None:
        """The parent did not run for so long: what it heard last is that much younger."""
        now = time.monotonic()
        self.motion.forgive(paused_s, now)
        if self.heartbeat_s is not None:
            self.heartbeat_s = min(self.heartbeat_s + paused_s, now)

    def exit_text(self) -> str:
        """How it ended, for people."""
        assert self.is_ending
        if self.ended_as is None:
            return "ended (the kernel is not done with it yet)"
        if self.ended_as >= 0:
            return f"ended with exit status {self.ended_as}"
        number = -self.ended_as
        names = {item.value: item.name for item in signal.Signals}
        return f"was killed by {names.get(number, f'signal {number}')}"

    def exit_hint(self) -> str:
        """What to look at, where the way it ended suggests something; may be empty."""
        if self.ended_as == -signal.SIGKILL:
            return " (if nobody sent that: the kernel does when memory runs out, see `dmesg`)"
        return ""

    def _remember(self, line: bytes) -> ChildStatus:
        status: ChildStatus
        try:
            status = self._decoder.decode(line)
        except msgspec.DecodeError as error:
            status = Failed(INTERNAL, f"an unreadable status line ({error}): {line[:200]!r}")
        match status:
            case Ready():
                self.ready = status
            case Failed():
                self.failed = self.failed or status
                self.wrong_s = min(self.wrong_s, time.monotonic())
            case Heartbeat():
                self._count(status)
                return status
            case LinesDropped(lines):
                self.dropped_lines = lines
                return status
        self.was_heard = True
        self.last_heard = heard_text(status)
        return status

    def _begin_end(self) -> None:
        self.is_ending = True
        self.wrong_s = min(self.wrong_s, time.monotonic())

    def _count(self, heartbeat: Heartbeat) -> None:
        self.heartbeat_s = now = time.monotonic()
        self.motion.take(heartbeat, now)

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # Not a session leader yet (between fork and setsid), which only it can be then.
            self._process.kill()

    def _close_input(self) -> None:
        if self.input_fd is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self.input_fd = None


def heard_text(status: ChildStatus) -> str:
    """A status in words, for those who wait for its process."""
    match status:
        case StartPhase(name, seconds):
            return f"'{name}' ended after {seconds:.1f} s"
        case Progress(task, done, total, unit):
            return f"'{task}' at {done} of {total} {unit}"
        case Ready():
            return "ready"
        case Failed():
            return "failed"
        case Heartbeat(launched, finished):
            return f"{finished} of {launched} steps done"
        case LinesDropped(lines):
            return f"{lines} lines of its log were dropped"
