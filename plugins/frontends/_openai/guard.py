"""Who may call: the API key on every route but two, and the Host header on loopback.

Knows nothing of what lies behind. Looks at `scope["path"]`, the path that is routed, never at a
URL put together from headers; a route added later is protected without doing anything.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from core.errors import RequestError
from plugins.frontends._openai.asgi import App, Receive, Scope, Send, header_values, send_error

OPEN_PATHS = frozenset({"/health", "/ready"})
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Wraps an application."""

    def __init__(
        self, app: App, *, api_key: str | None, host: str, allowed_hosts: Iterable[str]
    ) -> None:
        """`host` is what the server is bound to: the Host header is checked on loopback only,
        where a web page could otherwise reach the server through a name of its own (DNS
        rebinding)."""
        self._app = app
        self._key_hash = None if api_key is None else _digest(api_key.encode())
        self._hosts: frozenset[bytes] | None = None
        if _is_loopback(host):
            own = f"[{host}]" if ":" in host else host
            names = (*LOOPBACK_NAMES, own, *allowed_hosts)
            self._hosts = frozenset(name.lower().encode() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._hosts is not None and not self._is_own_host(scope):
            await send_error(
                send,
                RequestError(
                    "the Host header does not name this server; see frontend.options.allowed_hosts",
                    code="invalid_host",
                    status=403,
                ),
            )
        elif (
            self._key_hash is not None
            and scope["path"] not in OPEN_PATHS
            and (not self._has_key(scope))
        ):
            await send_error(
                send,
                RequestError(
                    "missing or wrong API key; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    status=401,
                ),
            )
        else:
            await self._app(scope, receive, send)

    def _is_own_host(self, scope: Scope) -> bool:
        assert self._hosts is not None
        values = header_values(scope, b"host")
        return all(_without_port(value.strip().lower()) in self._hosts for value in values)

    def _has_key(self, scope: Scope) -> bool:
        """Compares hashes, so that neither time nor encoding tells anything of the key."""
        assert self._key_hash is not None
        values = header_values(scope, b"authorization")
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        matches = hmac.compare_digest(_digest(key.strip()), self._key_hash)
        return matches and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_port(host: bytes) -> bytes:
    name, colon, port = host.rpartition(b":")
    return name if colon and port.isdigit() and not name.endswith(b":") else host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
