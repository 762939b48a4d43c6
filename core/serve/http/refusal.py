"""An error as an HTTP answer, for what is refused before any frontend sees it.

Knows nothing of connections. The body has OpenAI's form, as clients of every frontend know it.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from core.interfaces.http import RequestRecord

Headers = list[tuple[bytes, bytes]]
RETRY_AFTER_S = {429: 1, 503: 1}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, code: str, message: str) -> bytes:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


def error_headers(status: int, body: bytes) -> Headers:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    if status in RETRY_AFTER_S:
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S[status]))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 415:
        headers.append((b"accept-encoding", b"gzip"))
    return headers


async def send_refusal(
    send: Callable[[dict[str, Any]], Awaitable[None]],
    record: RequestRecord,
    status: int,
    code: str,
    message: str,
) -> None:
    """Answer a request through ASGI."""
    record.code = code
    body = error_body(status, code, message)
    headers = error_headers(status, body)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
