"""Raw ASGI helpers: read a body, send JSON or an error, notice a client that is gone.

Knows nothing of any API. Raw ASGI instead of request and response objects because a
streamed token passes here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from core.errors import RequestError
from core.frontend.errors import (
    Headers,
    as_request_error,
    error_body,
    error_headers,
    json_headers,
)
from core.interfaces.http import RequestRecord

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request under way: how to read and to answer it, and what is told of it."""

    receive: Receive
    send: Send
    record: RequestRecord


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header; names are lower case."""
    return [value for key, value in scope["headers"] if key == name]


def check_content_type(scope: Scope) -> None:
    """Raise RequestError 415 unless the body is said to be JSON. vLLM and SGLang refuse the same,
    with 400. A web page can send other types to any server without asking, and none where it takes
    a Blob."""
    values = header_values(scope, b"content-type")
    if [value.partition(b";")[0].strip().lower() for value in values] != [b"application/json"]:
        raise RequestError(
            "the body's Content-Type must be application/json "
            "(curl: -H 'Content-Type: application/json', or --json instead of -d)",
            code="unsupported_media_type",
            status=415,
        )


async def read_body(receive: Receive) -> bytes:
    """The whole body; the server bounds its size and time. Raises ClientGone, also where the server
    has answered already because a bound was passed."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def send_bytes(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    body = msgspec.json.encode(value)
    await send_bytes(send, status, json_headers(len(body)), body)


async def send_error(send: Send, error: Exception, headers: Headers | None = None) -> None:
    """`headers` go out beside those that every error has."""
    body = error_body(error)
    own = [*error_headers(error, body), *(headers or ())]
    await send_bytes(send, as_request_error(error).status, own, body)


@contextmanager
def watch_disconnect(receive: Receive, on_disconnect: Callable[[], None]) -> Iterator[None]:
    """Call `on_disconnect` where the client goes away inside the block. The body must have been
    read whole before."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_disconnect()

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()
