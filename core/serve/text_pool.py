"""The text service as the frontend sees it: jobs to a few warm processes, and their ends.

Implements core.interfaces.text.TextService. Lives in one event loop, which only writes and reads
frames. A job that meets a limit ends its worker and nothing else: the next is forked in
milliseconds, from a process that has everything built (see core.serve.text_process).
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections import deque
from typing import Any, cast

import msgspec

from core import errors
from core.errors import ModelError, RequestError
from core.interfaces.text import (
    BodyParts,
    ChatText,
    IdsToText,
    Prompt,
    PromptTexts,
    SplitBody,
    TextJob,
    TokenList,
    TokensJson,
)
from core.serve.text_jobs import PackedPrompt
from core.serve.text_process import (
    BUILDING_SIGNAL,
    COMMAND,
    FORK,
    KILL,
    LEAVING,
    LENGTH,
    REFUSED,
    RENDERING_SIGNAL,
    TOKENIZING_SIGNAL,
    BuildFailed,
    Died,
    RefusedJob,
    TemplateStatus,
    TextBoot,
    read_frame,
    send_frame,
)

WALL_S = 30.0  # of waiting and working together; a job that takes longer is answered with 503
MAX_WAITING = 4096  # jobs
SMALL_BYTES = 64 * 1024  # of a job; larger ones leave a worker free for those
# Where every worker has been at one job for longer while others wait, another is forked, so that
# a few jobs that run into their limits don't keep the rest waiting.
RELIEF_S = 0.05
EXTRA_WORKERS = 6
RESTART_S = 1.0  # between starts of a template process that doesn't stay
UNPACK_BYTES = 4 * 128 * 1024  # of ids that are turned into numbers between two pauses
END_S = 2.0

log = logging.getLogger(__name__)


class _Job:
    """A job and who waits for it."""

    __slots__ = ("began", "done", "frame", "is_large", "timer", "worker")

    def __init__(self, frame: bytes, done: "asyncio.Future[bytes]") -> None:
        self.frame = frame
        self.done = done
        self.is_large = len(frame) > SMALL_BYTES
        self.worker: _Worker | None = None
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


class _Worker(asyncio.Protocol):
    """One worker's socket. `job` is what it does now."""

    def __init__(self, pool: "TextPool", number: int) -> None:
        self.number = number
        self.job: _Job | None = None
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

    def begin(self, job: _Job) -> None:
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


class TextPool:
    """Build with `await TextPool.start(...)`; `close` ends its processes."""

    def __init__(self, boot: TextBoot, num_workers: int, wall_s: float = WALL_S) -> None:
        self._boot = boot
        self._num_workers = num_workers
        self._wall_s = wall_s
        self._loop = asyncio.get_running_loop()
        self._workers: dict[int, _Worker] = {}
        self._waiting: deque[_Job] = deque()
        self._next_number = 0
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._closed = False
        self._relief: asyncio.TimerHandle | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_status = msgspec.msgpack.Decoder(TemplateStatus).decode
        self._decode_refused = msgspec.msgpack.Decoder(RefusedJob).decode
        self._decode_prompts = msgspec.msgpack.Decoder(list[PackedPrompt]).decode
        self._decode_tokens = msgspec.msgpack.Decoder(TokensJson).decode
        self._decode_parts = msgspec.msgpack.Decoder(BodyParts).decode
        self._decode_bytes = msgspec.msgpack.Decoder(bytes).decode

    @classmethod
    async def start(
        cls, boot: TextBoot, num_workers: int = 2, *, wall_s: float = WALL_S
    ) -> "TextPool":
        """Build in another process, and fork workers. Raises ModelError where the tokenizer or a
        template can't be built within the limits."""
        pool = cls(boot, num_workers, wall_s)
        await pool._start_template()
        return pool

    async def chat(self, job: ChatText) -> Prompt:
        [packed] = self._decode_prompts(await self._do(job))
        return await _unpack(packed)

    async def prompts(self, job: PromptTexts) -> list[Prompt]:
        return [await _unpack(packed) for packed in self._decode_prompts(await self._do(job))]

    async def tokenize(self, job: TokenList) -> TokensJson:
        return self._decode_tokens(await self._do(job))

    async def detokenize(self, job: IdsToText) -> bytes:
        return self._decode_bytes(await self._do(job))

    async def split(self, job: SplitBody) -> BodyParts:
        return self._decode_parts(await self._do(job))

    def close(self) -> None:
        """End the processes. Jobs that wait are failed."""
        self._closed = True
        if self._relief is not None:
            self._relief.cancel()
        if self._restarting is not None:
            self._restarting.cancel()
        self._drop_template("the server is shutting down")

    def dispatch(self) -> None:
        """Give waiting jobs to idle workers, in their order, except that large ones leave one
        worker free for small ones."""
        if not self._waiting:
            return
        idle = [worker for worker in self._workers.values() if worker.is_idle]
        num_large = sum(w.job is not None and w.job.is_large for w in self._workers.values())
        passed: list[_Job] = []
        while idle and self._waiting:
            job = self._waiting.popleft()
            if job.done.done():
                continue
            if job.is_large and num_large >= max(self._num_workers - 1, 1):
                passed.append(job)
                continue
            num_large += job.is_large
            job.began = self._loop.time()
            idle.pop().begin(job)
        self._waiting.extendleft(reversed(passed))
        if self._waiting and self._relief is None:
            self._relief = self._loop.call_later(RELIEF_S, self._relieve)

    def retire(self, worker: _Worker) -> None:
        """Let a worker go that has become one too many."""
        num_staying = sum(not one.leaving for one in self._workers.values())
        if num_staying > self._num_workers and not self._waiting:
            worker.leaving = True
            worker.close()

    def _relieve(self) -> None:
        self._relief = None
        jobs = [worker.job for worker in self._workers.values()]
        since = self._loop.time() - RELIEF_S
        are_stuck = all(job is not None and job.began <= since for job in jobs)
        room = len(jobs) < self._num_workers + EXTRA_WORKERS
        if are_stuck and room and not self._closed and self._control is not None:
            self._loop.create_task(self._fork())
        self.dispatch()

    def look_at_end(self, worker: _Worker) -> None:
        """A worker's socket closed, or the template process told of its end: once both are known,
        its job gets its error and another worker takes its place."""
        if not worker.lost or worker.signal is None:
            return
        if self._workers.pop(worker.number, None) is None:
            return
        if worker.job is not None:
            worker.job.fail(_error_of(worker.signal, self._boot))
        is_one_short = len(self._workers) < self._num_workers
        if is_one_short and not self._closed and self._control is not None:
            self._loop.create_task(self._fork())

    async def _do(self, job: TextJob) -> bytes:
        """The payload of the job's answer."""
        if len(self._waiting) >= MAX_WAITING:
            raise RequestError(
                f"{MAX_WAITING} requests wait to be tokenized; try again later",
                code="queue_full",
                status=429,
            )
        waiter = _Job(self._encode(job), self._loop.create_future())
        waiter.timer = self._loop.call_later(self._wall_s, self._on_wall_time, waiter)
        self._waiting.append(waiter)
        self.dispatch()
        try:
            reply = await waiter.done
        finally:
            self._leave(waiter)
            # An error's traceback holds this frame, and with it a body of up to 8 MiB: that must
            # not lead back to the error, or only the cyclic collector would free them.
            del waiter
        if not reply[0] & REFUSED:
            return reply[1:]
        refused = self._decode_refused(reply[1:])
        raise RequestError(
            refused.message, param=refused.param, code=refused.code, status=refused.status
        )

    def _leave(self, job: _Job) -> None:
        """Nobody waits for it any more."""
        job.release()
        if job.frame:  # it was never begun
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _on_wall_time(self, job: _Job) -> None:
        if job.done.done():
            return
        if job.worker is not None:
            self._command(KILL, job.worker.number)
        job.fail(
            RequestError(
                f"the server was too busy to render and tokenize this within {self._wall_s:.0f} s; "
                "try again later",
                code="text_busy",
                status=503,
            )
        )

    async def _start_template(self) -> None:
        process, control = await asyncio.to_thread(_start_process, self._boot)
        if self._closed:
            control.close()
            return
        self._process, self._control = process, control
        control.setblocking(False)
        self._received.clear()
        self._loop.add_reader(control.fileno(), self._on_control)
        for _ in range(self._num_workers):
            await self._fork()

    async def _fork(self) -> None:
        """Have a worker forked. It can be given jobs at once: they wait in its socket."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        number = self._next_number
        self._next_number += 1
        worker = _Worker(self, number)
        try:
            if self._control is None:
                ours.close()
                return
            self._command(FORK, number, theirs.fileno())
        finally:
            theirs.close()
        await self._loop.create_unix_connection(lambda: worker, sock=ours)
        self._workers[number] = worker
        self.look_at_end(worker)
        self.dispatch()

    def _command(self, command: bytes, number: int, *fds: int) -> None:
        if self._control is None:
            return
        try:
            socket.send_fds(self._control, [COMMAND.pack(command, number)], fds)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                log.error("a text process can't be asked for: %s", error)

    def _on_control(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._on_template_gone()
            return
        self._received += data
        while len(self._received) >= LENGTH.size:
            [size] = LENGTH.unpack_from(self._received)
            end = LENGTH.size + size
            if len(self._received) < end:
                return
            status = self._decode_status(bytes(self._received[LENGTH.size : end]))
            del self._received[:end]
            if isinstance(status, Died) and (worker := self._workers.get(status.number)):
                worker.signal = status.signal
                self.look_at_end(worker)

    def _on_template_gone(self) -> None:
        self._drop_template("the process that renders and tokenizes ended; try again")
        if not self._closed:
            log.error("the text service's template process ended; starting another")
            self._restarting = self._loop.create_task(self._restart())

    def _drop_template(self, why: str) -> None:
        """Forget the process and its workers, which the kernel ends with it."""
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.close()
            if worker.job is not None:
                worker.job.fail(RequestError(why, code="text_busy", status=503))
        if self._closed:
            while self._waiting:
                self._waiting.popleft().fail(RequestError(why, code="shutting_down", status=503))
        if self._process is not None:
            _end_process(self._process)
            self._process = None

    async def _restart(self) -> None:
        while not self._closed:
            try:
                await self._start_template()
                return
            except Exception as error:
                log.error("the text service can't be started again: %s", error)
                await asyncio.sleep(RESTART_S)


async def _unpack(packed: PackedPrompt) -> Prompt:
    """With pauses: a million numbers take 15 ms to make."""
    ids: list[int] = []
    for begin in range(0, len(packed.ids), UNPACK_BYTES):
        if begin:
            await asyncio.sleep(0)
        ids += array("I", packed.ids[begin : begin + UNPACK_BYTES])
    return Prompt(
        num_tokens=packed.num_tokens,
        ids=ids,
        at_least=packed.at_least,
        text=packed.text,
        is_open=packed.is_open,
        offsets=None if packed.offsets is None else array("I", packed.offsets).tolist(),
    )


def _start_process(boot: TextBoot) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A template process that has built everything. Blocks meanwhile."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.serve.text_process", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # One text is one thread's work; a pool of threads would not survive the fork.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
    finally:
        theirs.close()
    send_frame(ours, msgspec.msgpack.encode(boot))
    frame = read_frame(ours)
    status = None if frame is None else msgspec.msgpack.decode(frame, type=TemplateStatus)
    if status is None or isinstance(status, BuildFailed):
        ours.close()
        code = process.wait()
        raise _build_error(status, code, boot)
    return process, ours


def _build_error(status: BuildFailed | None, code: int, boot: TextBoot) -> Exception:
    if status is not None:
        kind: Any = getattr(errors, status.kind, ModelError)
        return kind(status.message) if kind is ModelError else ModelError(status.message)
    if code == -BUILDING_SIGNAL:
        why = f"takes more than {boot.building_s:.0f} s of CPU time"
    else:
        why = f"ended its process with {code}; it may need more memory than is allowed"
    return ModelError(f"building the tokenizer and chat template in {boot.folder} {why}")


def _end_process(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        process.kill()  # its pipes are closed: it was about to end
        process.wait()


def _error_of(ended_by: int, boot: TextBoot) -> RequestError:
    """What a signal that ended a worker says about its job."""
    if ended_by == RENDERING_SIGNAL:
        return RequestError(
            f"the chat template took more than {boot.rendering_s} s of CPU time for these messages",
            param="messages",
            code="template_limit",
        )
    if ended_by == TOKENIZING_SIGNAL:
        return RequestError(
            "the tokenizer took more CPU time for this text than a request may have "
            f"({boot.tokenizing_s} s and {boot.tokenizing_s_per_million} s a million characters)",
            code="tokenizer_limit",
        )
    if ended_by == signal.SIGKILL:
        return RequestError(
            "the process that rendered and tokenized this was killed; try again later",
            code="text_busy",
            status=503,
        )
    return RequestError(
        "rendering or tokenizing this ended its process: it takes more memory than a request may "
        "have, or the library fails on it",
        code="too_large",
    )
