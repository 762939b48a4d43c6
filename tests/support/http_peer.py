"""A client of one `Connection`, without sockets: what it says and what it hears; and applications
that answer it."""

import asyncio
from typing import Any

from uvicorn.server import ServerState

from core.interfaces.http import HttpStats, RequestRecord
from core.serve.http.connection import Connection
from core.serve.http.limits import HttpLimits
from core.serve.http.shared import Shared

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """What connections share; `records` are those of the requests that ended."""

    def __init__(self, app: Any, **limits: Any) -> None:
        self.stats = HttpStats()
        self.records: list[RequestRecord] = []
        self.shared = Shared(app, HttpLimits(**limits), self.stats, self.records.append)
        self.state = ServerState()

    def connect(self) -> "Peer":
        return Peer(self)


class Peer:
    """The client, and the transport under the server's connection. A peer that does not read
    (`reads=False`) leaves what was written in the buffer."""

    def __init__(self, server: Server) -> None:
        self.heard = b""
        self.reads = True
        self.closed = False  # both ways
        self.shut = False  # the server has said that it writes no more
        self.reading_paused = False
        self._unsent = b""
        self._closing = False
        self._paused = False
        self.connection = Connection(server.shared, server.state)
        self.connection.connection_made(self)

    async def say(self, data: bytes) -> None:
        """Send, and let the server do what it has to."""
        if not self.closed:
            self.connection.data_received(data)
        await settle()

    def leave(self) -> None:
        self.connection.eof_received()
        self.close()

    def is_ending(self) -> bool:
        return self.shut or self.closed

    def take(self, num_bytes: int) -> None:
        """Read so much of what waits."""
        self.heard += self._unsent[:num_bytes]
        self._unsent = self._unsent[num_bytes:]
        if self._paused and len(self._unsent) < 16_384:
            self._paused = False
            self.connection.resume_writing()
        if self._closing and not self._unsent:
            self._end()

    # The transport's side.

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("10.0.0.9", 1234), "sockname": ("10.0.0.1", 80)}.get(name)

    def write(self, data: bytes) -> None:
        assert not self.shut
        if self.reads:
            self.heard += data
            return
        self._unsent += data
        if len(self._unsent) > 65_536 and not self._paused:
            self._paused = True
            self.connection.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def is_closing(self) -> bool:
        return self._closing or self.closed

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False

    def write_eof(self) -> None:
        self.shut = True

    def close(self) -> None:
        self._closing = True
        if not self._unsent:
            self._end()

    def abort(self) -> None:
        self._unsent = b""
        self._end()

    def _end(self) -> None:
        if not self.closed:
            self.closed = self._closing = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


async def settle(turns: int = 20) -> None:
    """Some turns of the event loop, in which no time passes."""
    for _ in range(turns):
        await asyncio.sleep(0)


def answers(data: bytes, methods: list[str] | None = None) -> list[tuple[int, bytes]]:
    """(status, body) of each answer; fails where they are not in form. A body that has no length
    reaches to the end. `100 Continue` is left out."""
    found = []
    while data:
        head, mark, data = data.partition(b"\r\n\r\n")
        assert mark, f"an answer without the end of its headers: {head[:200]!r}"
        lines = head.split(b"\r\n")
        version, status = lines[0].split(b" ")[:2]
        assert version == b"HTTP/1.1", lines[0]
        if status == b"100":
            continue
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
        method = methods[len(found)] if methods and len(found) < len(methods) else "GET"
        if method == "HEAD" or status in (b"204", b"304"):
            body = b""
        elif fields.get(b"transfer-encoding") == b"chunked":
            body, data = _chunks(data)
        elif b"content-length" in fields:
            size = int(fields[b"content-length"])
            body, data = data[:size], data[size:]
            assert len(body) == size
        else:
            body, data = data, b""
        found.append((int(status), body))
    return found


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size_text, mark, data = data.partition(b"\r\n")
        assert mark, "an answer that ends between two chunks"
        size = int(size_text, 16)
        assert data[size : size + 2] == b"\r\n", data[: size + 2][-80:]
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, data


def post(body=b"hello", extra=b"", length=None, version=b"1.1"):
    size = len(body) if length is None else length
    head = b"POST / HTTP/%b\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n" % (version, size, extra)
    return head + body


async def echo(scope, receive, send):
    """Answers with the method, the path and the size of the body."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    answer = f"{scope['method']} {scope['path']} {size}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})


class Stream:
    """An application that streams what a test gives it; one for all requests."""

    def __init__(self):
        self.pieces = asyncio.Queue()
        self.calls = 0
        self.gone = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.calls += 1
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.disconnect":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(lambda _: self.gone.set())
        while (piece := await self.pieces.get()) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        watch.cancel()
