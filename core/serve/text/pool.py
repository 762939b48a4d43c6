"""The text service as the frontend sees it: jobs to a few warm processes, and their ends.

Implements core.interfaces.text.TextService. Lives in one event loop, which only writes and reads
frames. A job that meets a limit ends its worker and nothing else: the next is forked in
milliseconds, from a process that has everything built (see core.serve.text.process).
"""

import asyncio
import contextlib
import errno
import logging
import socket
import subprocess
from array import array
from collections import deque

import msgspec

from core.errors import RequestError
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
from core.serve.text.jobs import PackedPrompt
from core.serve.text.process import (
    COMMAND,
    FORK,
    KILL,
    LENGTH,
    REFUSED,
    Died,
    RefusedJob,
    TemplateStatus,
    TextBoot,
)
from core.serve.text.template_process import end_process, error_of, start_process
from core.serve.text.worker import Job, Worker

WALL_S = 30.0  # of waiting and working together; a job that takes longer is answered with 503
MAX_WAITING = 4096  # jobs
# Where every worker has been at one job for longer while others wait, another is forked, so that
# a few jobs that run into their limits don't keep the rest waiting.
RELIEF_S = 0.05
EXTRA_WORKERS = 6
RESTART_S = 1.0  # between starts of a template process that doesn't stay
UNPACK_BYTES = 4 * 128 * 1024  # of ids that are turned into numbers between two pauses
END_S = 2.0

log = logging.getLogger(__name__)


class TextPool:
    """Build with `await TextPool.start(...)`; `close` ends its processes."""

    def __init__(self, boot: TextBoot, num_workers: int, wall_s: float = WALL_S) -> None:
        self._boot = boot
        self._num_workers = num_workers
        self._wall_s = wall_s
        self._loop = asyncio.get_running_loop()
        self._workers: dict[int, Worker] = {}
        self._waiting: deque[Job] = deque()
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
        passed: list[Job] = []
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

    def retire(self, worker: Worker) -> None:
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

    def look_at_end(self, worker: Worker) -> None:
        """A worker's socket closed, or the template process told of its end: once both are known,
        its job gets its error and another worker takes its place."""
        if not worker.lost or worker.signal is None:
            return
        if self._workers.pop(worker.number, None) is None:
            return
        if worker.job is not None:
            worker.job.fail(error_of(worker.signal, self._boot))
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
        waiter = Job(self._encode(job), self._loop.create_future())
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

    def _leave(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.release()
        if job.frame:  # it was never begun
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _on_wall_time(self, job: Job) -> None:
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
        process, control = await asyncio.to_thread(start_process, self._boot)
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
        worker = Worker(self, number)
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
            end_process(self._process)
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
