"""What every server answers itself, whatever its frontend: probes, and the routes of exporters.

Knows nothing of any API. It stands behind the guard, so that exporters' routes want the
key; probes don't.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import msgspec

from core.errors import RequestError
from core.frontend.asgi import App, Receive, Scope, Send, send_bytes, send_error
from core.frontend.errors import code_of
from core.interfaces.frontend import Engine, EngineState
from core.interfaces.http import PROBES, RequestRecord, record_of

ALLOWED = "GET, HEAD"
_SLASHES = re.compile("/{2,}")
_JSON = b"application/json"


class Answer(NamedTuple):
    content_type: bytes
    body: bytes


OwnRoute = Callable[[], Awaitable[Answer]]


class OwnRoutes:
    """Wraps an ASGI application."""

    def __init__(self, app: App, engine: Engine, routes: Mapping[str, OwnRoute]) -> None:
        self._app = app
        self._engine = engine
        self._routes = {**dict(zip(PROBES, (self._health, self._ready), strict=True)), **routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = plain_path(scope["path"]) if scope["type"] == "http" else ""
        route = self._routes.get(path)
        if route is None:
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        record.is_own = True
        if scope["method"] not in ("GET", "HEAD"):
            await self._refuse_method(scope["method"], send, record)
            return
        record.route = path
        try:
            content_type, body = await route()
        except RequestError as error:
            record.code = code_of(error)
            await send_error(send, error)
        else:
            headers = [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
            ]
            await send_bytes(send, 200, headers, body)

    async def _refuse_method(self, method: str, send: Send, record: RequestRecord) -> None:
        if method == "OPTIONS":
            await send_bytes(send, 204, [(b"allow", f"{ALLOWED}, OPTIONS".encode())], b"")
            return
        message = f"method not allowed here; allowed: {ALLOWED}"
        error = RequestError(message, code="method_not_allowed", status=405)
        record.code = code_of(error)
        await send_error(send, error, [(b"allow", ALLOWED.encode())])

    async def _health(self) -> Answer:
        """Whether this process and the engine behind it live."""
        if not self._engine.alive:
            raise RequestError("the engine has stopped", code="engine_dead", status=503)
        return Answer(_JSON, msgspec.json.encode({"status": "ok"}))

    async def _ready(self) -> Answer:
        """Whether a request sent now would be answered."""
        state = self._engine.state
        if state is not EngineState.SERVING:
            raise RequestError(f"not ready: {state.value}", code=state.value, status=503)
        return Answer(_JSON, msgspec.json.encode({"status": "ready"}))


def plain_path(path: str) -> str:
    """Slashes too many, at the end or in a row, mean nothing: addresses are put together by hand.
    A redirect would make some clients send a GET."""
    plain = _SLASHES.sub("/", path)
    return plain if plain == "/" else plain.removesuffix("/")
