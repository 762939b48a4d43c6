"""Who may call, whatever frontend is chosen: Host header, API key, pages of other origins.

Knows nothing of what lies behind. Looks at `scope["path"]`, the path that is routed, never at a
URL put together from headers; a route that a frontend adds later is protected without its doing.

A web page can make its reader's browser send requests to a server that only the reader reaches.
What gives it away is what no page can change: the Host it was told (a name of the page's own, in
DNS rebinding), and the Origin and Sec-Fetch-Site headers. A request with the right key is not a
page's doing: browsers keep no such key, and ask before they send one for a page.
"""

import hashlib
import hmac
import ipaddress
import re

from core.errors import RequestError
from core.frontend.asgi import App, Receive, Scope, Send, header_values, send_error
from core.interfaces.http import PROBES, record_of
from core.serve.http.server import is_loopback
from core.settings.config import ANY_ORIGIN, FrontendConfig

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
PREFLIGHT_MAX_AGE_S = 600
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,1024}")
_METHOD = re.compile(rb"[A-Za-z]{1,32}")


class Guard:
    """Wraps an ASGI application."""

    def __init__(self, app: App, config: FrontendConfig, api_key: str | None) -> None:
        """Host headers are checked on loopback, and wherever frontend.allowed_hosts has names."""
        self._app = app
        self._key_hash = None if api_key is None else _digest(api_key.encode())
        self._origins = frozenset(origin.lower().encode() for origin in config.cors_origins)
        self._any_origin = ANY_ORIGIN in config.cors_origins
        self._on_loopback = is_loopback(config.host)
        self._hosts: frozenset[bytes] | None = None
        if self._on_loopback or config.allowed_hosts:
            own = f"[{config.host}]" if ":" in config.host else config.host
            names = (*LOOPBACK_NAMES, own, *config.allowed_hosts)
            self._hosts = frozenset(name.lower().encode() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._is_own_host(scope):
            message = "the Host header does not name this server; see frontend.allowed_hosts"
            await _refuse(scope, send, message, "invalid_host")
            return
        origins = header_values(scope, b"origin")
        is_listed = len(origins) == 1 and self._is_listed(origins[0])
        asks_first = self._is_preflight(scope)
        if is_listed:
            self._allow_origin(scope, origins[0])
        if is_listed and asks_first:
            await self._answer_preflight(scope, send)
        elif self._needs_key(scope) and not asks_first:
            if self._has_key(scope):
                await self._app(scope, receive, send)
            else:
                await self._refuse_key(scope, send)
        elif not is_listed and (asks_first or self._is_foreign(scope, origins)):
            await self._refuse_origin(scope, send)
        else:
            await self._app(scope, receive, send)

    # Hosts.

    def _is_own_host(self, scope: Scope) -> bool:
        if self._hosts is None:
            return True
        for value in header_values(scope, b"host"):
            name = _without_port(value.strip().lower())
            # An address can't be made to mean another machine; probes of a cluster use it.
            if name not in self._hosts and (self._on_loopback or not _is_address(name)):
                return False
        return True

    # Keys.

    def _needs_key(self, scope: Scope) -> bool:
        return self._key_hash is not None and scope["path"] not in PROBES

    async def _refuse_key(self, scope: Scope, send: Send) -> None:
        message = "missing or wrong API key; send it as Authorization: Bearer KEY"
        await _refuse(scope, send, message, "invalid_api_key", 401)

    def _has_key(self, scope: Scope) -> bool:
        """Compares hashes, so that neither time nor encoding tells anything of the key."""
        assert self._key_hash is not None
        values = header_values(scope, b"authorization")
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        matches = hmac.compare_digest(_digest(key.strip()), self._key_hash)
        return matches and scheme.lower() == b"bearer"

    # Origins.

    def _is_listed(self, origin: bytes) -> bool:
        return self._any_origin or origin.lower() in self._origins

    def _is_foreign(self, scope: Scope, origins: list[bytes]) -> bool:
        """Whether a page of another origin sent it. `same-site` is another origin as well: a page
        on another port of this machine, for one."""
        sites = header_values(scope, b"sec-fetch-site")
        if sites == [b"same-origin"]:
            return False
        if origins:
            own = [value.strip().lower() for value in header_values(scope, b"host")]
            return len(origins) != 1 or [origins[0].lower().partition(b"://")[2]] != own
        if not sites or sites == [b"none"]:
            return False  # no browser, or its reader typed the address
        follows_link = header_values(scope, b"sec-fetch-mode") == [b"navigate"]
        return not (follows_link and scope["method"] in ("GET", "HEAD"))

    def _is_preflight(self, scope: Scope) -> bool:
        """Browsers ask without the key whether they may send it."""
        return (
            scope["method"] == "OPTIONS"
            and bool(header_values(scope, b"origin"))
            and bool(header_values(scope, b"access-control-request-method"))
        )

    async def _refuse_origin(self, scope: Scope, send: Send) -> None:
        message = (
            "a web page of another origin may not call this server; list its origin in "
            "frontend.cors_origins to allow it"
        )
        await _refuse(scope, send, message, "cross_origin")

    def _allow_origin(self, scope: Scope, origin: bytes) -> None:
        headers = record_of(scope).headers
        headers.append((b"access-control-allow-origin", b"*" if self._any_origin else origin))
        headers.append((b"access-control-expose-headers", b"*"))
        if not self._any_origin:
            headers.append((b"vary", b"Origin"))

    async def _answer_preflight(self, scope: Scope, send: Send) -> None:
        headers = [(b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S)]
        for asked, answer, form in (
            (b"access-control-request-method", b"access-control-allow-methods", _METHOD),
            (b"access-control-request-headers", b"access-control-allow-headers", _HEADER_NAMES),
        ):
            value = b", ".join(header_values(scope, asked))
            if value and form.fullmatch(value):
                headers.append((answer, value))
        if header_values(scope, b"access-control-request-private-network") == [b"true"]:
            headers.append((b"access-control-allow-private-network", b"true"))
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Scope, send: Send, message: str, code: str, status: int = 403) -> None:
    record_of(scope).code = code
    await send_error(send, RequestError(message, code=code, status=status))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_port(host: bytes) -> bytes:
    name, colon, port = host.rpartition(b":")
    return name if colon and port.isdigit() and not name.endswith(b":") else host


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.decode().strip("[]"))
    except ValueError:
        return False
    return True
