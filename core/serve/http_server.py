"""uvicorn with the edges closed: an early bind, header limits, no signal handlers of its own.

Knows nothing of the application it serves. uvicorn has no limit on header bytes or on the time
a client takes to send them, so a small subclass of its httptools protocol adds both.
"""

import asyncio
import errno
import ipaddress
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from core.errors import ConfigError, ResourceError

MAX_HEADER_BYTES = 16 * 1024  # request line and headers together
HEADER_DEADLINE_S = 10.0
MAX_DISCARDED_BYTES = 64 * 1024 * 1024  # of a body whose request was answered before its end
BACKLOG = 2048
FLUSH_S = 2  # for answers still being written when the server ends


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes any free one.

    Raises ResourceError naming the port's owner where it is taken, ConfigError for a host that
    is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"frontend.host={host!r} can't be resolved: {error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # at once: a port that is only bound can be taken by another
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"frontend.port={port} on {host} is in use{_owner(port)}; end that process or "
                "choose another port (frontend.port=0 takes any free one)"
            ) from error
        if error.errno == errno.EACCES:
            raise ResourceError(
                f"frontend.port={port} on {host} is not allowed to this user; choose one above 1023"
            ) from error
        raise ConfigError(
            f"frontend.host={host!r} can't be bound: {error.strerror}; use an address of this "
            "machine, 127.0.0.1 for local clients or 0.0.0.0 for all"
        ) from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _owner(port: int) -> str:
    """ " by pid 17 (name)" of the process that listens on a port, where this user may see it."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid is not None
            ):
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        return ""  # not ours to see; the message does without
    return ""


class Server(uvicorn.Server):
    """Serves one application on one listening socket until `should_exit` is set."""

    def __init__(
        self, application: Any, *, keep_alive_s: float, on_started: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=LimitedProtocol,
                ws="none",
                lifespan="auto",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type] # only compared
                timeout_graceful_shutdown=FLUSH_S,
                backlog=BACKLOG,
            )
        )
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process that runs this server decides what signals do."""
        yield


class LimitedProtocol(HttpToolsProtocol):
    """One connection, with limits on header bytes, header time and discarded body bytes.

    A body whose request was answered before its end (413) is read on and dropped for a while:
    closing at once would reset the connection before the client has read the answer.
    """

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _discarded_bytes = 0
    _in_headers = True
    _headers_too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        # Whole headers are measured in on_headers_complete; this is for those that never end.
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self._headers_too_large = True
            self._refuse(431, "the request's headers are too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._start_header_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_headers = False
        self._header_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            self._headers_too_large = True
            raise ValueError("headers too large")  # the parser stops; see send_400_response
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            if self._timer is None:
                self._timer = self.loop.call_later(HEADER_DEADLINE_S, self.transport.abort)
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._discarded_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._headers_too_large:
            self._refuse(431, "the request's headers are too large")
        else:
            self._refuse(400, "this is not a valid HTTP request")

    def _answering(self) -> bool:
        return self.cycle is not None and (
            self.cycle.response_started and not self.cycle.response_complete
        )

    def _start_header_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_DEADLINE_S, self._on_header_deadline)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_header_deadline(self) -> None:
        if self._answering():  # a pipelined request: its time begins when it is its turn
            self._start_header_timer()
            return
        self._refuse(408, f"the request's headers took more than {HEADER_DEADLINE_S:.0f} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer outside the application and close. Never into another answer."""
        if self.transport.is_closing():
            return
        if self._answering():
            self.transport.close()
            return
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Headers Too Large"}[status]
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, reason.encode(), len(body), body)
        )
        self.transport.close()
