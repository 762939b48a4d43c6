"""One request and its answer, as an ASGI application sees them.

Knows nothing of parsing or of timers: the connection feeds the body in and is told when the answer
is complete. The body is bounded here, whatever the application behind: a request that goes too far
is answered on the spot, and its application is told that the client is gone.
"""

import asyncio
import http
import logging
import re
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from core.errors import NodeweaveError, RequestError
from core.frontend.errors import code_of, error_body, error_headers
from core.interfaces.http import CLIENT_CLOSED
from core.serve.http.body import BodyError, GzipDecoder
from core.serve.http.head import REQUEST_ID_HEADER, Head, Refusal
from core.serve.http.limits import HttpLimits

HIGH_WATER_BYTES = 64 * 1024  # of a body that waits for the application
_NOT_IN_NAMES = re.compile(rb'[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\"]')
_NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_WITHOUT_BODY = (204, 304)

Message = MutableMapping[str, Any]
App = Callable[[Message, Any, Any], Any]
log = logging.getLogger(__name__)


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


class Owner(Protocol):
    """The connection of an exchange."""

    limits: HttpLimits
    write_paused: bool

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]: ...

    @property
    def transport_write(self) -> Callable[[bytes], None]: ...

    def write(self, data: bytes) -> None: ...

    async def wait_writable(self) -> None: ...

    def resume_reading(self) -> None: ...

    def count_body(self, exchange: "Exchange", num_bytes: int) -> bool: ...

    def too_many_bodies(self) -> Refusal: ...

    def on_exchange_end(self, exchange: "Exchange") -> None: ...

    def on_response_complete(self, exchange: "Exchange") -> None: ...

    def abort(self) -> None: ...


class Exchange:
    """`receive` and `send` are the application's; the rest belongs to the connection."""

    def __init__(
        self,
        connection: Owner,
        head: Head,
        *,
        keep_alive: bool,
    ) -> None:
        self.scope = head.scope
        self.record = head.record
        self.keep_alive = keep_alive
        self.message_complete = False  # the request's last byte has come
        self.response_started = False
        self.response_complete = False
        self.disconnected = False  # the application writes for nobody
        self.buffered = bytearray()  # of the body; the application has not asked for it yet
        self.counted_bytes = 0  # of the body, in the sum over all connections
        self._connection = connection
        self._write_now = connection.transport_write  # while not disconnected
        self._expects_continue = head.expects_continue
        self._encoding = head.encoding
        self._decoder = GzipDecoder() if head.encoding in (b"gzip", b"x-gzip") else None
        self._announced_bytes = head.announced_bytes
        self._body_given = False  # the application has the whole body
        self._changed = asyncio.Event()
        self._chunked = False
        self._left_bytes: int | None = None  # of an answer with a Content-Length

    # What the connection says.

    def feed(self, data: bytes) -> None:
        self.buffered += data
        self._changed.set()

    def complete(self) -> None:
        self.message_complete = True
        self._changed.set()

    def disconnect(self) -> None:
        """The application is told that the client is gone; what it still sends is dropped."""
        self.disconnected = True
        self.buffered = bytearray()
        self._changed.set()

    async def run(self, app: App) -> None:
        """Let the application answer; whatever it does, the request ends here."""
        try:
            await app(self.scope, self.receive, self.send)
        except NodeweaveError as error:  # nothing broke here: an answer under way lost its engine
            log.error("an answer that had begun is cut: %s", error)
            self._give_up(code_of(error))
        except Exception as error:
            log.error("the application failed", exc_info=error)
            self._give_up()
        except BaseException:
            self._give_up()
            raise
        else:
            if not self.response_complete and not self.disconnected:
                log.error("the application returned without an answer")
                self._give_up()
        finally:
            self._finish_record()
            self._connection.on_exchange_end(self)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer instead of the application, at once; it is told that the client is gone."""
        if self.response_started:
            self._connection.abort()
            return
        self.record.code = code
        error = RequestError(message, code=code, status=status)
        body = error_body(error)
        self._begin(status, error_headers(error, body))
        self._write(b"" if self.scope["method"] == "HEAD" else body)
        self.disconnect()
        self._end()

    # ASGI.

    async def receive(self) -> Message:
        """The next piece of the body; after its end, "http.disconnect" once there is a reason."""
        if self._expects_continue and not self._body_given:
            self._expects_continue = False
            if not self.response_started and not self.disconnected and self._may_come():
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._is_over():
            if not self._body_given and (message := self._next_piece()) is not None:
                if self._decoder is not None:
                    await asyncio.sleep(0)  # others get their turn between two pieces
                return message
            if self._is_over():
                break  # it was refused on the way
            self._connection.resume_reading()
            self._changed.clear()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Write a part of the answer; waits while the client is slow to take the last ones."""
        if self._connection.write_paused and not self.disconnected:
            await self._connection.wait_writable()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, got {message['type']!r}")
            self._begin(message["status"], message.get("headers", ()))
        elif not self.response_complete:
            if message["type"] != "http.response.body":
                raise RuntimeError(f"expected http.response.body, got {message['type']!r}")
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']!r} after the end of the answer")

    def _is_over(self) -> bool:
        return self.disconnected or self.response_complete

    # The body.

    def _may_come(self) -> bool:
        """Whether the body is wanted at all; answers where it is not."""
        limits = self._connection.limits
        if self._announced_bytes is not None and self._announced_bytes > limits.max_body_bytes:
            self._refuse_size()
            return False
        if self._encoding not in (b"", b"identity", b"gzip", b"x-gzip"):
            self.refuse(
                415,
                "unsupported_encoding",
                "the body's Content-Encoding is not known; allowed: gzip, or none",
            )
            return False
        return True

    def _next_piece(self) -> Message | None:
        """A message for the application; None where more has to come, or it was refused."""
        if not self._may_come():
            return None
        whole = self.message_complete
        try:
            if self._decoder is None:
                piece, more = bytes(self.buffered), not whole
                self.buffered = bytearray()
            else:
                piece, more = self._decode(self._decoder, whole)
        except BodyError as error:
            self.refuse(400, "invalid_encoding", str(error))
            return None
        if not piece and more:
            return None
        if not self._count(len(piece)):
            return None
        self._body_given = not more
        return {"type": "http.request", "body": piece, "more_body": more}

    def _decode(self, decoder: GzipDecoder, whole: bool) -> tuple[bytes, bool]:
        """The next piece, and whether more follows."""
        decoder.feed(bytes(self.buffered))
        self.buffered = bytearray()
        piece = decoder.take()
        if piece or not whole:
            return piece, True
        decoder.finish()
        return b"", False

    def _count(self, num_bytes: int) -> bool:
        """Count a piece against the limits; answers where it is too much."""
        connection = self._connection
        self.record.bytes_in += num_bytes
        if self.record.bytes_in > connection.limits.max_body_bytes:
            self._refuse_size()
            return False
        # As it came it has been counted; what it was unpacked to comes on top.
        if self._decoder is not None and not connection.count_body(self, num_bytes):
            self.refuse(*connection.too_many_bodies())
            return False
        return True

    def _refuse_size(self) -> None:
        most = self._connection.limits.max_body_bytes
        message = f"the body is larger than {most} bytes (frontend.max_body_bytes)"
        self.refuse(413, "body_too_large", message)

    # The answer.

    def _begin(self, status: int, headers: Any) -> None:
        """Write the status line and the headers."""
        record = self.record
        self._chunked, self._left_bytes = False, None
        parts = [STATUS_LINES[status]]
        own = [(REQUEST_ID_HEADER, record.request_id.encode()), *record.headers]
        says_close = has_length = False
        for name, value in (*self._connection.default_headers, *headers, *own):
            if _NOT_IN_NAMES.search(name) or _NOT_IN_VALUES.search(value):
                raise RuntimeError(f"{name!r} can't be sent: it breaks the form of a header")
            name = name.lower()
            if name == b"content-length":
                self._left_bytes, has_length = int(value), True
            elif name == b"transfer-encoding":
                continue  # how an answer is framed is decided here
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive, says_close = False, True
            parts.append(b"%b: %b\r\n" % (name, value))
        if self.scope["method"] == "HEAD" or status in _WITHOUT_BODY:
            self._left_bytes = 0
        elif not has_length and self.scope["http_version"] == "1.0":
            self.keep_alive = False  # the end of the connection ends the body
        elif not has_length:
            self._chunked = True
            parts.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive and not says_close:
            parts.append(b"connection: close\r\n")
        elif self.keep_alive and self.scope["http_version"] == "1.0":
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        self.response_started = True
        record.status = status
        record.first_byte_s = time.perf_counter() - record.begin_s
        self._connection.write(b"".join(parts))

    def _send_body(self, body: bytes, more: bool) -> None:
        if self._chunked:
            size = len(body)
            self.record.bytes_out += size
            if more:  # a streamed token passes here
                if size:
                    self._write_now(b"%x\r\n%b\r\n" % (size, body))
                return
            self._write_now(b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if size else b"0\r\n\r\n")
        else:
            self._write(body)
            if more:
                return
            if self._left_bytes:
                raise RuntimeError("the answer is shorter than its Content-Length")
        self._end()

    def _write(self, body: bytes) -> None:
        """Body bytes as they are, within the announced length."""
        if self.scope["method"] == "HEAD" or self.record.status in _WITHOUT_BODY:
            return
        if self._left_bytes is not None:
            if len(body) > self._left_bytes:
                raise RuntimeError("the answer is longer than its Content-Length")
            self._left_bytes -= len(body)
        self.record.bytes_out += len(body)
        self._connection.write(body)

    def _end(self) -> None:
        self.response_complete = True
        self._changed.set()
        self._connection.on_response_complete(self)

    def _give_up(self, code: str = "internal_error") -> None:
        """The application did not finish its answer."""
        if self.disconnected or self.response_complete:
            return
        self.record.code = code
        if self.response_started:
            self._connection.abort()  # so that the client sees that something is missing
        else:
            self.keep_alive = False
            self.record.headers = []
            self.refuse(500, "internal_error", "internal error; see the server's log")

    def _finish_record(self) -> None:
        record = self.record
        record.duration_s = time.perf_counter() - record.begin_s
        if self.disconnected and not self.response_complete:
            record.status = CLIENT_CLOSED
