"""uvicorn with the edges closed: an early bind, our own connections, no signal handlers.

Knows nothing of the application it serves. uvicorn's part is the lifespan, the accepting and the
end; its connections bound neither bytes nor time, so core.serve.http.connection has its own.
"""

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import uvicorn
from uvicorn.server import ServerState

from core.errors import ConfigError, ResourceError
from core.interfaces.http import HttpStats, RequestRecord
from core.serve.http.connection import Connection
from core.serve.http.limits import HttpLimits
from core.serve.http.shared import Shared

BACKLOG = 2048
# A peer that is gone without a word, while nothing is sent to it, is noticed after a minute.
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
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
        for level, option, value in KEEP_ALIVE:  # accepted sockets inherit them
            listener.setsockopt(level, option, value)
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
        self,
        application: Any,
        *,
        limits: HttpLimits,
        stats: HttpStats,
        on_end: Callable[[RequestRecord], None],
        on_started: Callable[[], None],
    ) -> None:
        """`stats` is counted in; `on_end` gets the record of each request as it ends."""

        def count_and_tell(record: RequestRecord) -> None:
            stats.count(record)
            on_end(record)

        shared = Shared(application, limits, stats, count_and_tell)

        def connect(server_state: ServerState, **_: Any) -> Connection:
            return Connection(shared, server_state)

        super().__init__(
            uvicorn.Config(
                application,
                http=connect,  # type: ignore[arg-type]
                ws="none",
                lifespan="auto",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
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
