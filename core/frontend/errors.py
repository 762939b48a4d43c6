"""Errors as HTTP answers: small, and never echoing what was sent at length.

The body has the form of OpenAI's, as clients of every server know it. `RequestError` becomes its
own status; a dead engine is 500 for those it hit and 503 for those who come later. Knows nothing of
routes or of connections.
"""

from typing import Any

import msgspec

from core.errors import RequestError, WorkerDied

MAX_MESSAGE_CHARACTERS = 800  # at most four bytes each, so that a body stays under 4 KiB
MAX_NAME_CHARACTERS = 64
# Until a client should try again. A queue, connections and bodies have room once another request
# ends; a server that starts, drains or is dead takes longer to change.
RETRY_AFTER_S = {429: 1, 503: 5}
SOONER_S = {"too_many_connections": 1, "too_many_bodies": 1}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_encoder = msgspec.json.Encoder()

Headers = list[tuple[bytes, bytes]]


def error_body(error: Exception) -> bytes:
    """{"error": {...}} as JSON, less than 4 KiB."""
    request_error = as_request_error(error)
    return _encoder.encode(
        {
            "error": {
                "message": shorten(str(request_error), MAX_MESSAGE_CHARACTERS),
                "type": _type_of(request_error.status),
                "param": shorten(request_error.param, MAX_NAME_CHARACTERS),
                "code": shorten(request_error.code, MAX_NAME_CHARACTERS),
            }
        }
    )


def as_request_error(error: Exception) -> RequestError:
    """What a client is told of any exception. Unexpected ones say nothing of their insides."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, WorkerDied):
        return RequestError(f"the engine has stopped: {error}", code="engine_dead", status=500)
    return RequestError("internal error; see the server's log", code="internal_error", status=500)


def code_of(error: Exception) -> str:
    """The word for what went wrong, for logs and metrics; "" where there is none."""
    return as_request_error(error).code or ""


def shorten(text: str | None, limit: int) -> Any:
    """`text` without unprintable characters and cut to `limit` characters; None stays None."""
    if text is None:
        return None
    clean = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def json_headers(num_bytes: int) -> Headers:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % num_bytes),
    ]


def error_headers(error: Exception, body: bytes) -> Headers:
    told = as_request_error(error)
    headers = json_headers(len(body))
    if told.status in RETRY_AFTER_S:
        seconds = SOONER_S.get(told.code or "", RETRY_AFTER_S[told.status])
        headers.append((b"retry-after", b"%d" % seconds))
    if told.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if told.code == "unsupported_encoding":
        headers.append((b"accept-encoding", b"gzip"))  # of requests, as RFC 7694 has it
    return headers


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
