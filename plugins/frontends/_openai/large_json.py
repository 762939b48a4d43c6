"""JSON of large answers, made in small pieces outside the event loop.

Encoding holds the interpreter's lock until it is done, and building dictionaries keeps a thread
busy. So a large answer is built in a thread of its own, which others interrupt, its long lists are
encoded slice by slice, and a list that stands in an answer several times (the log-probabilities of
a prompt with n answers) is encoded once and kept once. Knows nothing of what the values mean.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from core.frontend.asgi import Send, send_json
from core.frontend.errors import json_headers

SLICE = 64  # items of a list that are encoded at once
LARGE_VALUES = 2048  # an answer of fewer is made in the event loop
WRITE_BYTES = 256 * 1024
_encode = msgspec.json.Encoder().encode


def json_parts(value: Any) -> list[bytes]:
    """The JSON of a value in parts. Lists of more than SLICE items are taken to consist of small
    items, and not to change any more."""
    parts: list[bytes] = []
    _add(value, parts, {})
    return parts


async def send_large_json(send: Send, num_values: int, build: Callable[[], Any]) -> None:
    """Build an answer and send it, aside where it has many values."""
    if num_values < LARGE_VALUES:
        await send_json(send, build())
        return
    parts = await asyncio.to_thread(lambda: _grouped(json_parts(build())))
    headers = json_headers(sum(map(len, parts)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def large_raw(num_values: int, build: Callable[[], Any]) -> Any:
    """A value to be encoded later: as it is, or where it has many values as its JSON."""
    if num_values < LARGE_VALUES:
        return build()
    return msgspec.Raw(await asyncio.to_thread(lambda: b"".join(json_parts(build()))))


def _add(value: Any, parts: list[bytes], seen: dict[int, list[bytes]]) -> None:
    """`seen`: the parts of long lists by identity."""
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        for index, (name, item) in enumerate(value.items()):
            parts += (b"," if index else b"{", _encode(name), b":")
            _add(item, parts, seen)
        parts.append(b"}")
    elif isinstance(value, list) and len(value) > SLICE:
        if id(value) not in seen:
            slices = [value[i : i + SLICE] for i in range(0, len(value), SLICE)]
            seen[id(value)] = [b"[", b",".join(_encode(one)[1:-1] for one in slices), b"]"]
        parts += seen[id(value)]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            parts.append(b"," if index else b"[")
            _add(item, parts, seen)
        parts.append(b"]")
    else:
        parts.append(_encode(value))


def _grouped(parts: list[bytes]) -> list[bytes]:
    """The same in parts that are worth a write each; large ones stay the objects that they are."""
    grouped: list[bytes] = []
    small: list[bytes] = []
    size = 0
    for part in parts:
        if len(part) >= WRITE_BYTES:
            grouped += (b"".join(small), part)
            small, size = [], 0
            continue
        small.append(part)
        size += len(part)
        if size >= WRITE_BYTES:
            grouped.append(b"".join(small))
            small, size = [], 0
    return [part for part in (*grouped, b"".join(small)) if part]
