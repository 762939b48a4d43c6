"""The text service's processes: `python -m core.serve.text.process FD`, started by `TextPool`.

The first one, the *template*, builds the tokenizer and its chat templates once and does nothing
with them: it forks workers, which share what it built, and says when one has ended and how. A
worker does jobs one after the other. Everything a checkpoint or a request could make run without
end runs here, where the kernel ends it: building within RLIMIT_CPU, rendering and tokenizing within
interval timers that count CPU time (a busy machine takes none of it away), all within RLIMIT_AS.

Frames are a length in four bytes and msgpack. All ends of pipes lie in the frontend: when it is
gone, however that happened, so are these processes.
"""

import gc
import os
import resource
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import msgspec

from core.cluster.processes.channel import PARENT_PID_VARIABLE, exit_with_parent, failure_kind
from core.errors import ModelError, NodeweaveError, RequestError
from core.interfaces.control import HF_TOKENIZER, ModelFiles
from core.interfaces.text import TextJob
from core.interfaces.tokenizer import Tokenizer
from core.serve.text.jobs import TextJobs
from core.tokenizers.load import load_tokenizer

MIB = 1024 * 1024
FORK, KILL = b"F", b"K"
COMMAND = struct.Struct("<cq")  # what the frontend asks for, and a worker's number
LENGTH = struct.Struct("<I")
# The first byte of a worker's answer, a sum of these.
OK, REFUSED, LEAVING = 0, 1, 2  # LEAVING: this was the worker's last
# The signals that end a worker say which limit it met.
RENDERING_SIGNAL, TOKENIZING_SIGNAL = signal.SIGVTALRM, signal.SIGPROF
BUILDING_SIGNAL = signal.SIGXCPU


class TextBoot(msgspec.Struct, kw_only=True):
    """What a template process is told. Times are of CPU, memory is address space beyond what the
    process has after building."""

    folder: str
    eos_ids: list[int]
    tokenizer: str = HF_TOKENIZER  # what loads it (core.interfaces.tokenizer)
    building_s: float = 60.0
    building_bytes: int = 8192 * MIB
    rendering_s: float = 2.5  # the template's own counted limit, of 2 s, says more
    tokenizing_s: float = 2.0
    tokenizing_s_per_million: float = 5.0  # of characters, besides
    job_bytes: int = 512 * MIB
    job_bytes_per_byte: int = 192  # of the job's frame, besides
    keep_bytes: int = 256 * MIB  # a worker that has grown by more is replaced after its job

    @classmethod
    def of(cls, files: ModelFiles) -> "TextBoot":
        """For the tokenizer of a model."""
        return cls(folder=files.tokenizer_dir, eos_ids=files.eos_ids, tokenizer=files.tokenizer)


class Up(msgspec.Struct, tag=True):
    """Built: workers can be forked."""


class BuildFailed(msgspec.Struct, tag=True):
    kind: str  # of core.errors
    message: str


class Died(msgspec.Struct, tag=True):
    """A worker has ended. `signal` is 0 where it ended by itself."""

    number: int
    signal: int


class RefusedJob(msgspec.Struct):
    """A RequestError on its way."""

    message: str
    param: str | None
    code: str | None
    status: int


TemplateStatus = Up | BuildFailed | Died


def send_frame(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(LENGTH.pack(len(payload)) + payload)


def read_frame(connection: socket.socket) -> bytes | None:
    """The next frame; None at the end."""
    head = _read_exactly(connection, LENGTH.size)
    return head and _read_exactly(connection, LENGTH.unpack(head)[0])


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    pieces = []
    while size:
        try:
            piece = connection.recv(min(size, MIB))
        except ConnectionError:
            return None
        if not piece:
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class KernelLimits:
    """Implements core.serve.text.jobs.TextLimits: the kernel ends this process at a limit."""

    def __init__(self, boot: TextBoot) -> None:
        self._boot = boot
        self._base_bytes = _statm(0)

    def allow_memory(self, job_size: int) -> None:
        boot = self._boot
        most = self._base_bytes + boot.job_bytes + boot.job_bytes_per_byte * job_size
        _limit(resource.RLIMIT_AS, most)

    @contextmanager
    def rendering(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_VIRTUAL, self._boot.rendering_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    @contextmanager
    def tokenizing(self, num_characters: int) -> Iterator[None]:
        boot = self._boot
        extra_s = boot.tokenizing_s_per_million * num_characters / 1e6
        signal.setitimer(signal.ITIMER_PROF, boot.tokenizing_s + extra_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def run_worker(connection: socket.socket, tokenizer: Tokenizer, boot: TextBoot) -> None:
    """Do jobs until the other end is gone, or this process has grown too large to be kept."""
    limits = KernelLimits(boot)
    jobs = TextJobs(tokenizer, limits)
    decode = msgspec.msgpack.Decoder(TextJob).decode
    encode = msgspec.msgpack.Encoder().encode
    start_bytes = _statm(1)
    while (frame := read_frame(connection)) is not None:
        limits.allow_memory(len(frame))
        try:
            kind, reply = OK, encode(jobs.run(decode(frame)))
        except RequestError as error:
            refused = RefusedJob(str(error)[:4096], error.param, error.code, error.status)
            kind, reply = REFUSED, encode(refused)
        except BaseException as error:
            # Of ours, or of the tokenizers library, whose panics are no Exceptions: a regular
            # expression that it gives up on, for example. It is this job's alone.
            message = f"this can't be tokenized: {type(error).__name__}: {error}"
            refused = RefusedJob(message[:300], None, "text_failed", 400)
            kind, reply = REFUSED, encode(refused)
        del frame
        leaving = _statm(1) - start_bytes > boot.keep_bytes
        send_frame(connection, bytes([kind + LEAVING * leaving]) + reply)
        if leaving:
            return


class _Template:
    """Forks workers, kills them when told, and tells of their ends."""

    def __init__(self, control: socket.socket, tokenizer: Tokenizer, boot: TextBoot) -> None:
        self._control = control
        self._tokenizer = tokenizer
        self._boot = boot
        self._pids: dict[int, int] = {}  # number -> pid, of the living
        # A signal writes into a pipe, so that waiting ends.
        self._woken, wake = socket.socketpair()
        self._woken.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        try:
            self._serve()
        finally:
            signal.set_wakeup_fd(-1)  # workers may end after this, when the pipe is closed

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._control:
                        if not self._obey():
                            return
                    else:
                        self._woken.recv(4096)
                self._reap()

    def _obey(self) -> bool:
        """One command; False at the end of them."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, COMMAND.size, 1)
        except ConnectionError:
            return False
        if len(data) < COMMAND.size:
            return False
        command, number = COMMAND.unpack(data)
        if command == FORK:
            self._fork(number, socket.socket(fileno=fds[0]))
        elif (pid := self._pids.get(number)) is not None:
            os.kill(pid, signal.SIGKILL)
        return True

    def _fork(self, number: int, connection: socket.socket) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(connection)
        connection.close()
        self._pids[number] = pid

    def _become_worker(self, connection: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            exit_with_parent()
            # What the library prints when it gives up would be a client's to repeat at will.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for other in (self._control, self._woken, self._wake):
                other.close()
            run_worker(connection, self._tokenizer, self._boot)
            status = 0
        except ConnectionError:
            status = 0  # the frontend went away in the middle of an answer
        finally:
            os._exit(status)

    def _reap(self) -> None:
        for number, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[number]
                died = Died(number, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
                send_frame(self._control, msgspec.msgpack.encode(died))


def build(boot: TextBoot) -> Tokenizer:
    """The tokenizer with its templates, within limits. Raises the errors of core.errors."""
    _limit(resource.RLIMIT_CPU, int(boot.building_s))
    _limit(resource.RLIMIT_AS, _statm(0) + boot.building_bytes)
    try:
        tokenizer = load_tokenizer(boot.tokenizer, boot.folder, boot.eos_ids)
        tokenizer.compile_templates()
    except MemoryError as error:
        raise ModelError(
            f"building the tokenizer in {boot.folder} takes more than "
            f"{boot.building_bytes // MIB} MiB"
        ) from error
    _limit(resource.RLIMIT_CPU, resource.RLIM_INFINITY)
    _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    return tokenizer


def _limit(kind: int, most: int) -> None:
    """Set a soft limit, no further than the hard one allows."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and (most == resource.RLIM_INFINITY or most > hard):
        most = hard
    resource.setrlimit(kind, (most, hard))


def _statm(column: int) -> int:
    """Bytes of this process: 0 address space, 1 resident."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[column]) * resource.getpagesize()


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    # The terminal's ctrl-c and a stop of the group are for the parent to decide on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ[PARENT_PID_VARIABLE] = str(os.getpid())  # of the workers
    frame = read_frame(control)
    if frame is None:
        return 0
    boot = msgspec.msgpack.decode(frame, type=TextBoot)
    try:
        tokenizer = build(boot)
    except NodeweaveError as error:
        send_frame(control, msgspec.msgpack.encode(BuildFailed(failure_kind(error), str(error))))
        return 1
    gc.collect()
    gc.freeze()  # so that collections in workers don't copy the pages they share
    try:
        send_frame(control, msgspec.msgpack.encode(Up()))
        _Template(control, tokenizer, boot).run()
    except BrokenPipeError:
        pass  # the frontend is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
