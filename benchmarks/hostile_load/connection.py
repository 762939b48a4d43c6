"""What attackers send with: raw connections to one server, and requests as bytes.

Knows no attack. A connection never raises for what the other side does: how it ended is a word, and
where an answer came, the word is its status.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWER_S = 180.0  # in which an answer's head must come; longer is told as "no answer"
CONNECT_S = 20.0


@dataclass(frozen=True)
class Target:
    """The server that is attacked, and the model that it serves."""

    host: str
    port: int
    model: str


def request(
    body: bytes,
    path: str = COMPLETIONS,
    headers: str = "Content-Type: application/json\r\n",
    method: str = "POST",
    length: int | None = None,
) -> bytes:
    """The bytes of a request on a connection of its own. `length`: what is said, where that is not
    the body's."""
    size = len(body) if length is None else length
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
        f"Content-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


def asked(path: str = COMPLETIONS, **fields: Any) -> bytes:
    """A request whose body is these fields."""
    return request(json.dumps(fields).encode(), path)


@asynccontextmanager
async def connected(
    target: Target, receive_bytes: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end. `receive_bytes`: how little the kernel may hold for a
    client that reads nothing."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            await loop.sock_connect(sock, (target.host, target.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=64 * 1024)
    except BaseException:
        sock.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(reader: asyncio.StreamReader) -> str:
    """The status of the answer that comes next."""
    async with asyncio.timeout(ANSWER_S):
        line = await reader.readline()
    words = line.split()
    return words[1].decode("latin-1") if len(words) > 1 else "closed"


async def send_and_read(target: Target, data: bytes) -> str:
    """Send all, read the status, hang up."""
    async with connected(target) as (reader, writer):
        writer.write(data)
        with contextlib.suppress(ConnectionError):  # it may have answered before it closed
            await writer.drain()
        return await status_of(reader)


async def outcome(attack: Any) -> str:
    """What became of an attack, in one word."""
    try:
        return str(await attack)
    except TimeoutError:
        return "no answer"
    except ConnectionResetError:
        return "reset"
    except (ConnectionError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        return type(error).__name__


def end_with_reset(writer: asyncio.StreamWriter) -> None:
    """Let the connection end with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def words(choice: random.Random, number: int) -> str:
    """Text of about so many tokens."""
    return " ".join(choice.choice(_WORDS) for _ in range(number))


_WORDS = [
    "river", "stone", "letter", "window", "garden", "morning", "engine", "paper", "silver",
    "walking", "under", "nobody", "house", "seven", "answer", "people", "water", "before", "winter",
    "music", "country", "yellow", "reason", "village", "simple",
]  # fmt: skip
