"""Sends a load to an OpenAI-compatible server and notes when every event of its streams came.

One asyncio loop. While a load runs a read is a timestamp and the bytes it brought, nothing more;
they are taken apart when the load is over, so that the client is not what is measured. How late the
loop itself was is measured beside it. Knows nothing of who serves.
"""

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from benchmarks.serving.arrivals import Conversation, Load

HEARTBEAT_S = 0.005
END = b"data: [DONE]"
CUT = "time was over"


@dataclass(slots=True)
class Sent:
    """One request's fate. Times are seconds of `time.perf_counter`."""

    due: float  # when it should have been sent
    new_tokens: int
    begun: float = 0.0  # when its connection was begun
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream brought: when each event with text came, in order."""

    due: float
    begun: float
    event_times: list[float]
    num_tokens: int  # by the server's own count
    num_cached: int | None  # prompt tokens that it says it did not compute
    wanted_tokens: int
    error: str | None

    @property
    def is_whole(self) -> bool:
        return (
            self.error is None and self.num_tokens == self.wanted_tokens and bool(self.event_times)
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a load. `was_cut`: time was over before all answers were whole."""

    begin: float
    end: float
    answers: list[Answer]
    was_cut: bool
    loop_lags: list[float]  # seconds by which heartbeats came too late
    cpu_s: float


class Stream(asyncio.Protocol):
    """A request on a connection of its own."""

    def __init__(self, payload: bytes, sent: Sent, done: "asyncio.Future[None]") -> None:
        self._payload, self._sent, self._done = payload, sent, done
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        cast(asyncio.Transport, transport).write(self._payload)

    def data_received(self, data: bytes) -> None:
        reads = self._sent.reads
        reads.append((time.perf_counter(), data))
        tail = data if len(data) >= 64 or len(reads) < 2 else reads[-2][1] + data
        if END in tail[-64:]:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._done.done():
            self._sent.error = repr(exc)
        self._end()

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if not self._done.done():
            self._done.set_result(None)


def payload(host: str, model: str, prompt: list[int], new_tokens: int) -> bytes:
    """A request to /v1/completions that is streamed, greedy, and has exactly so many tokens."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def drive(host: str, port: int, model: str, load: Load, until: float) -> Outcome:
    """Run a load; at `until` (of `time.perf_counter`) what is not whole yet is given up."""
    payloads = {
        id(turn): payload(f"{host}:{port}", model, turn.prompt, turn.new_tokens)
        for each in load.conversations
        for turn in each.turns
    }
    runner = _Run(host, port, load, payloads)
    gc.collect()
    gc.disable()
    cpu_s = time.process_time()
    try:
        begin, was_cut = run_async(lambda: runner.run(until))
    finally:
        gc.enable()
    cpu_s = time.process_time() - cpu_s
    return Outcome(
        begin,
        max((sent.reads[-1][0] for sent in runner.sent if sent.reads), default=begin),
        [answer_of(sent) for sent in runner.sent],
        was_cut,
        runner.lags,
        cpu_s,
    )


def run_async(main: Callable[[], Awaitable[Any]]) -> Any:
    """On uvloop, where it is there."""

    async def run() -> Any:
        return await main()

    try:
        import uvloop
    except ImportError:
        return asyncio.run(run())
    return uvloop.run(run())


class _Run:
    def __init__(self, host: str, port: int, load: Load, payloads: dict[int, bytes]) -> None:
        self._address, self._load, self._payloads = (host, port), load, payloads
        self.sent: list[Sent] = []
        self.lags: list[float] = []

    async def run(self, until: float) -> tuple[float, bool]:
        begin = time.perf_counter()
        heart = asyncio.ensure_future(self._beat())
        tasks = [
            asyncio.ensure_future(self._converse(each, begin)) for each in self._load.conversations
        ]
        _, left = await asyncio.wait(tasks, timeout=max(until - time.perf_counter(), 0.0))
        for task in [heart, *left]:
            task.cancel()
        results = await asyncio.gather(heart, *tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return begin, bool(left)

    async def _converse(self, conversation: Conversation, begin: float) -> None:
        due = begin + conversation.at_s
        for turn in conversation.turns:
            due += turn.pause_s
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            sent = Sent(due, turn.new_tokens)
            self.sent.append(sent)
            try:
                await self._send(sent, self._payloads[id(turn)])
            except OSError as error:
                sent.error = repr(error)
            except asyncio.CancelledError:
                sent.error = CUT
                raise
            if sent.error is not None:
                return
            due = time.perf_counter()

    async def _send(self, sent: Sent, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        sent.begun = time.perf_counter()
        transport, _ = await loop.create_connection(
            lambda: Stream(data, sent, done), *self._address
        )
        try:
            await done
        finally:
            transport.abort()

    async def _beat(self) -> None:
        while True:
            due = time.perf_counter() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self.lags.append(time.perf_counter() - due)


# What came, taken apart


def answer_of(sent: Sent) -> Answer:
    """Every event of an answer, with the time of the read that completed it."""
    times: list[float] = []
    num_tokens, num_cached, error = 0, None, sent.error
    try:
        for at, event in events(sent.reads):
            if "error" in event:
                raise ValueError(json.dumps(event["error"]))
            if any(choice.get("text") for choice in event.get("choices", ())):
                times.append(at)
            if usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
                num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except ValueError as problem:
        error = error or str(problem)
    return Answer(sent.due, sent.begun, times, num_tokens, num_cached, sent.new_tokens, error)


def events(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON of each server-sent event. Raises ValueError where the answer is none of them."""
    rest = b""
    for at, data in body_pieces(reads):
        *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:") and event != END:
                yield at, json.loads(event[5:])


def body_pieces(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body without its chunks' frames. Raises ValueError for another status than 200."""
    buffer, position = b"", 0
    left: int | None = None  # bytes of the chunk under way; None: its size comes next
    chunked = has_head = False
    for at, data in reads:
        buffer = buffer[position:] + data
        position = 0
        if not has_head:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                continue
            head = buffer[:end].lower()
            if not head.startswith(b"http/1.1 200"):
                whole = b"".join(data for _, data in reads)
                raise ValueError(whole[:600].decode(errors="replace"))
            chunked, has_head, position = b"transfer-encoding: chunked" in head, True, end + 4
        if not chunked:
            yield at, buffer[position:]
            position = len(buffer)
            continue
        while position < len(buffer):
            if left is None:
                end = buffer.find(b"\r\n", position)
                if end < 0:
                    break
                left, position = int(buffer[position:end], 16) + 2, end + 2  # its own line end
            piece = buffer[position : position + left]
            position += len(piece)
            if text := piece[: max(left - 2, 0)]:
                yield at, text
            left -= len(piece)
            if left == 0:
                left = None
