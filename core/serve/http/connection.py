"""One HTTP/1 connection: its requests in order, and limits on all that a client may send or hold.

Knows nothing of applications beyond starting them. Every byte that is no body is counted, and in
every state but one a timer runs, after which the connection ends; while an answer is being made it
is the application's time, and the kernel's keep-alive looks after the peer. Whatever arrives, only
this connection ends, and nothing is ever written into the answer to another request.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from uvicorn.server import ServerState

from core.errors import RequestError
from core.frontend.errors import error_body, error_headers
from core.interfaces.http import RequestRecord
from core.serve.http.deadlines import InputTimer, OutputTimer, Wait
from core.serve.http.exchange import HIGH_WATER_BYTES, STATUS_LINES, Exchange
from core.serve.http.head import REQUEST_ID_HEADER, Head, Refusal, address, request_id
from core.serve.http.limits import SPARE_DESCRIPTORS
from core.serve.http.parser import Address, ParserState, RequestParser
from core.serve.http.shared import Shared

MOST_FAREWELLS = SPARE_DESCRIPTORS // 2  # connections that are told why they are refused


class Connection(asyncio.Protocol):
    """The protocol of one accepted socket."""

    def __init__(self, shared: Shared, server_state: ServerState) -> None:
        self.limits = shared.limits
        self.write_paused = False
        self._shared = shared
        self._server_state = server_state
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self.client: Address = None
        self.server: Address = None
        self._parser = RequestParser(self.limits, self)
        self._counted = False  # among the open connections
        self._ignored_bytes = 0  # that came for nobody

        self._reading: Exchange | None = None  # whose body comes next
        self._current: Exchange | None = None  # that is being answered
        self._waiting: deque[Exchange] = deque()  # read, to be answered after it
        self.deaf = False  # what still comes is dropped
        self._refusal: Refusal | None = None  # to be written after the last answer
        self._closing = False
        self._read_paused = False
        self._writable: asyncio.Event = asyncio.Event()
        self._input_timer = InputTimer(self.limits, self._on_input_deadline)
        self._output_timer = OutputTimer(self.limits.stall_s, self._unsent_bytes, self.abort)

    # The transport.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        has_room = self._shared.make_room()
        self._counted = True
        self._shared.stats.connections += 1
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        peer = transport.get_extra_info("peername")
        own = transport.get_extra_info("sockname")
        self.client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self.server = (str(own[0]), int(own[1])) if isinstance(own, tuple) else None
        if has_room:
            self._shared.idle[self] = None
            self._settle()
        elif self._shared.stats.connections > self.limits.max_connections + MOST_FAREWELLS:
            self.abort()
        else:
            most = self.limits.max_connections
            message = f"the server has {most} connections; try again later"
            self._refuse(Refusal(503, "too_many_connections", message))

    def connection_lost(self, exc: Exception | None) -> None:
        self.deaf = self._closing = True
        self._stop_timers()
        self._shared.idle.pop(self, None)
        self._server_state.connections.discard(self)
        if self._counted:
            self._counted = False
            self._shared.stats.connections -= 1
        for exchange in self._waiting:
            self._uncount(exchange)
        self._waiting.clear()
        if self._current is not None:
            self._current.disconnect()
        self.resume_writing()
        # What refers to this object goes, so that both are freed now: the cyclic collector comes by
        # rarely, and thousands of connections may end until then.
        self._current = self._reading = None
        self._parser.close()
        del self._input_timer, self._output_timer

    def eof_received(self) -> None:
        """A client that stops sending counts as gone, as most that do so are: the transport
        closes, after it has written what was said already."""

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            self._ignored_bytes += len(data)
            if self._ignored_bytes > self.limits.max_discarded_bytes:
                self.abort()
            return
        self._parser.feed(data)
        self._settle()  # deaf or not: the last request has come, so nothing is waited for

    def pause_writing(self) -> None:
        self.write_paused = True
        self._writable.clear()
        self._output_timer.start(self.limits.stall_s)

    def resume_writing(self) -> None:
        self.write_paused = False
        self._writable.set()
        if not self._closing:
            self._output_timer.stop()

    def shutdown(self) -> None:
        """The server ends: finish what is being answered, then close."""
        if self._current is None:
            self._close()
        else:
            self._current.keep_alive = False

    def abort(self) -> None:
        """End the connection at once."""
        self.deaf = self._closing = True
        if self._current is not None:
            self._current.disconnect()
        self._shared.idle.pop(self, None)
        self._transport.abort()

    # What an exchange uses.

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server_state.default_headers

    @property
    def transport_write(self) -> Callable[[bytes], None]:
        write: Callable[[bytes], None] = self._transport.write
        return write

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    async def wait_writable(self) -> None:
        await self._writable.wait()

    def resume_reading(self) -> None:
        """The application wants more of the body, or to hear that the client is gone."""
        if self._read_paused and not self._overfed():
            self._read_paused = False
            self._transport.resume_reading()

    def count_body(self, exchange: Exchange, num_bytes: int) -> bool:
        """Whether so many more bytes of a body fit beside those of all requests under way."""
        stats = self._shared.stats
        if stats.body_bytes + num_bytes > self.limits.max_total_body_bytes:
            return False
        stats.body_bytes += num_bytes
        exchange.counted_bytes += num_bytes
        return True

    def too_many_bodies(self) -> Refusal:
        most = self.limits.max_total_body_bytes
        message = f"the bodies of all requests under way exceed {most} bytes; try again later"
        return Refusal(503, "too_many_bodies", message)

    def on_exchange_end(self, exchange: Exchange) -> None:
        """The application has returned."""
        self._uncount(exchange)
        self._shared.on_end(exchange.record)

    def on_response_complete(self, exchange: Exchange) -> None:
        """The answer is written: go on with the next request, or close."""
        if exchange is not self._current:
            return
        self._current = None
        if self._closing or self._transport.is_closing():
            return
        if self._waiting and exchange.keep_alive:
            self._start(self._waiting.popleft())
        elif self._refusal is not None and exchange.keep_alive:
            self._refuse(self._refusal)
        elif not exchange.keep_alive:
            self.deaf = True
            self._close()
        else:
            self._shared.idle[self] = None
        self.resume_reading()
        self._settle()

    # What the parser tells.

    @property
    def reads(self) -> bool:
        return not self.deaf and self._reading is not None

    def takes_request(self) -> bool:
        """Too many requests may wait already: answer those, then close. A client may send the
        others again, as none of them was begun."""
        if len(self._waiting) < self.limits.max_pipelined:
            return True
        self.deaf = True
        self._waiting[-1].keep_alive = False
        return False

    def head_came(self, head: Head, *, keep_alive: bool) -> None:
        exchange = self._reading = Exchange(self, head, keep_alive=keep_alive)
        if self._current is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
            self._pause_if_overfed()

    def body_came(self, body: bytes) -> Refusal | None:
        exchange = self._reading
        assert exchange is not None
        if exchange.response_complete:
            self._ignored_bytes += len(body)
            if self._ignored_bytes > self.limits.max_discarded_bytes:
                self.abort()
        elif not exchange.disconnected:
            if not self.count_body(exchange, len(body)):
                return self.too_many_bodies()
            exchange.feed(body)
            self._pause_if_overfed()
        return None

    def message_came(self) -> None:
        assert self._reading is not None
        self._reading.complete()
        if not self._reading.keep_alive:
            self.deaf = True
        self._reading = None
        self._ignored_bytes = 0

    # Order of answers.

    def _uncount(self, exchange: Exchange) -> None:
        self._shared.stats.body_bytes -= exchange.counted_bytes
        exchange.counted_bytes = 0

    def _start(self, exchange: Exchange) -> None:
        self._shared.idle.pop(self, None)
        self._current = exchange
        task = self._loop.create_task(exchange.run(self._shared.app))
        task.add_done_callback(self._server_state.tasks.discard)
        self._server_state.tasks.add(task)

    def break_off(self, refusal: Refusal) -> None:
        """What the client sends makes no sense any more: say so when it is its turn, and close."""
        if self.deaf:
            return
        self.deaf = True
        current = self._current
        if current is None:
            if self._parser.state is ParserState.HEAD or not self._parser.num_messages:
                self._refuse(refusal)
            else:
                self._close()  # all that was asked has been answered
        elif current is self._reading:
            current.keep_alive = False
            if current.response_started:
                current.disconnect()  # it answers something that was never said whole
                self.abort()
            else:
                current.refuse(*refusal)
        else:
            if self._reading is not None and self._waiting:
                self._uncount(self._waiting.pop())  # the one that broke
            self._refusal = refusal

    def _refuse(self, refusal: Refusal) -> None:
        """Answer outside of any exchange, and close."""
        status, code, message = refusal
        record = RequestRecord(
            request_id=request_id([]), status=status, code=code, client=address(self.client)
        )
        error = RequestError(message, code=code, status=status)
        body = error_body(error)
        headers = [
            *self.default_headers,
            *error_headers(error, body),
            (REQUEST_ID_HEADER, record.request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.write(b"%b%b\r\n%b" % (STATUS_LINES[status], lines, body))
        record.bytes_out = len(body)
        self._shared.on_end(record)
        self.deaf = True
        self._close()

    def _close(self) -> None:
        """Close once what was written has been sent. Until the client has read it, what it sends
        is dropped: data that nobody takes would make the kernel throw the answer away."""
        if self._closing or self._transport.is_closing():
            return
        at_rest = self._parser.state is ParserState.BETWEEN and not self.deaf
        in_body = self._parser.state is ParserState.BODY
        self.deaf = self._closing = True
        self._shared.idle.pop(self, None)
        self._stop_timers()
        if at_rest:
            self._output_timer.start(self.limits.stall_s)
            self._transport.close()
            return
        self._output_timer.start(self.limits.discard_s if in_body else self.limits.linger_s)
        self._transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    # Back pressure.

    def _overfed(self) -> bool:
        """Whether more is read than the application has taken."""
        of_current = self._current.buffered if self._current is not None else b""
        ahead = sum(len(exchange.buffered) for exchange in self._waiting)
        return (
            len(of_current) > HIGH_WATER_BYTES
            or ahead > HIGH_WATER_BYTES
            or len(self._waiting) >= self.limits.max_pipelined
        )

    def _pause_if_overfed(self) -> None:
        if not self._read_paused and self._overfed():
            self._read_paused = True
            self._transport.pause_reading()

    # Timers.

    def _settle(self) -> None:
        """Let the timer of the present state run."""
        if not self._closing:
            self._input_timer.settle(self._waits_for(), self._parser.num_messages)

    def _waits_for(self) -> Wait:
        if self._current is not None:
            return Wait.BODY if self._current is self._reading else Wait.NOTHING
        if self._parser.state is ParserState.HEAD:
            return Wait.HEAD
        if self._parser.state is ParserState.BODY:
            return Wait.REST
        return Wait.NEXT if self._parser.num_messages else Wait.FIRST

    def _on_input_deadline(self, wait: Wait, seconds: float) -> None:
        if wait is Wait.BODY and self._read_paused:
            self._settle()  # the application does not take what has come
        elif wait is Wait.NEXT:
            self._close()
        elif wait is Wait.REST:
            self.abort()
        elif wait is Wait.BODY:
            message = f"the body took more than {seconds:g} s"
            self.break_off(Refusal(408, "timeout", message))
        else:
            message = f"the request's headers took more than {seconds:g} s"
            self.break_off(Refusal(408, "timeout", message))

    def _unsent_bytes(self) -> int:
        size: int = self._transport.get_write_buffer_size()
        return size

    def _stop_timers(self) -> None:
        self._input_timer.stop()
        self._output_timer.stop()
