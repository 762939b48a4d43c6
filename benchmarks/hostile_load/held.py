"""Attacks that hold a connection: slow, silent, gone, or with more in it than one request.

The kinds are in `HELD`: seconds between two of each, and the most at a time.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable

from benchmarks.hostile_load.connection import (
    CHAT,
    COMPLETIONS,
    Target,
    asked,
    connected,
    end_with_reset,
    request,
    send_and_read,
    status_of,
    words,
)

Attack = Callable[[Target, random.Random], Awaitable[str]]
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
CHUNKED_BODY = b'20\r\n{"prompt": "a", "max_tokens": 1}\r\n'
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW_S = 150.0  # longer than every deadline of the server's


async def abort(target: Target, choice: random.Random) -> str:
    """Ask for much, then hang up: at once, in the middle of the body, or after some tokens."""
    fields = {"prompt": words(choice, choice.choice([5, 200, 3000])), "max_tokens": 200}
    data = asked(
        stream=choice.random() < 0.7, n=choice.choice([1, 1, 8]), ignore_eos=True, **fields
    )
    async with connected(target) as (reader, writer):
        if choice.random() < 0.5:
            end_with_reset(writer)
        if choice.random() < 0.2:
            data = data[: len(data) // 2]
        writer.write(data)
        await writer.drain()
        patience_s = choice.choice([0.0, 0.0, 0.5, 5.0])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await reader.read(4096)
                await reader.read(4096)
    return "hung up"


async def slow_reader(target: Target, choice: random.Random) -> str:
    """Take nothing of a large answer, or of a stream."""
    text = words(choice, 200_000)
    data = choice.choice(
        [
            asked("/tokenize", prompt=text, return_token_strs=True),
            asked(prompt="Once", max_tokens=100, n=16, stream=True, logprobs=20, ignore_eos=True),
        ]
    )
    async with connected(target, receive_bytes=4096) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(data)
        await asyncio.sleep(choice.choice([5, 30, SLOW_S]))
    return "hung up"


async def slow_writer(target: Target, choice: random.Random) -> str:
    """Send a byte or two a second: a head, a body, chunks, trailers."""
    start, drip = choice.choice(
        [
            (b"", b"G"),
            (b"GET / HTTP/1.1\r\n", b"A: b\r\n"),
            (request(b"{", length=4000), b" "),
            (CHUNKED, b"1\r\n \r\n"),
            (CHUNKED + b"5", b";a=b"),
            (CHUNKED + CHUNKED_BODY + b"0\r\n", b"A: b\r\n"),
            (GET, b"\r\n"),
        ]
    )
    async with connected(target) as (reader, writer):
        writer.write(start)
        if start is GET:
            await reader.readuntil(b"\r\n\r\n")
        answer = asyncio.ensure_future(reader.read(20))
        for _ in range(int(SLOW_S)):
            writer.write(drip)
            await asyncio.wait([answer], timeout=1)
            if answer.done():
                return answer.result()[9:12].decode("latin-1") or "closed"
        answer.cancel()
        return "still open"


async def trailers(target: Target, choice: random.Random) -> str:
    """Megabytes of trailers, of chunk extensions, of empty lines."""
    filler = choice.choice(
        [
            CHUNKED + CHUNKED_BODY + b"0\r\n" + b"A: b\r\n" * 200_000,
            CHUNKED + CHUNKED_BODY + b"0\r\n" + b"A" * 1_000_000,
            CHUNKED + b"1;" + b"a=b;" * 200_000,
            CHUNKED + b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n",
            b"\r\n" * 500_000,
        ]
    )
    return await send_and_read(target, filler)


async def pipelining(target: Target, choice: random.Random) -> str:
    """Hundreds of requests in one write; reads some of the answers."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    one = choice.choice([GET, request(body).replace(b"Connection: close\r\n", b"")])
    async with connected(target) as (reader, writer):
        writer.write(one * choice.choice([20, 300]))
        status = await status_of(reader)
        await asyncio.sleep(choice.choice([0, 1]))
        return status


async def idle(target: Target, choice: random.Random) -> str:
    """Be there, with nothing, a piece of a head or an answered request behind it, until the
    server ends it."""
    async with connected(target) as (reader, writer):
        writer.write(choice.choice([b"", b"GET / HTTP/1.1\r\nHost:", GET, GET, GET]))
        async with asyncio.timeout(SLOW_S):
            while await reader.read(4096):
                pass
    return "closed"


async def stream_and_wait(target: Target, choice: random.Random) -> str:
    """Ask for streams over one connection and read them slowly, a line now and then."""
    messages = [{"role": "user", "content": words(choice, 30)}]
    data = asked(CHAT, messages=messages, max_tokens=60, stream=True)
    async with connected(target, receive_bytes=4096) as (reader, writer):
        writer.write(data)
        status = await status_of(reader)
        for _ in range(40):
            async with asyncio.timeout(60):
                if not await reader.readline():
                    break
            await asyncio.sleep(0.5)
        return status


async def scrape(target: Target, choice: random.Random) -> str:
    path = choice.choice(["/metrics", "/health", "/ready", "/v1/models", "/server_info"])
    return await send_and_read(target, request(b"", path, "", "GET"))


async def refused_while_sending(target: Target, choice: random.Random) -> str:
    """Announce a large body to a route that refuses it before it came, and send on."""
    path = choice.choice([COMPLETIONS, "/nowhere"])
    headers = "Content-Type: text/plain\r\n"
    return await send_and_read(target, request(b"x" * 4_000_000, path, headers, length=10**9))


HELD: dict[Attack, tuple[float, int]] = {
    abort: (1.0, 8),
    slow_reader: (8.0, 16),
    slow_writer: (2.0, 32),
    trailers: (6.0, 4),
    pipelining: (5.0, 8),
    stream_and_wait: (15.0, 4),
    scrape: (1.0, 4),
    refused_while_sending: (10.0, 4),
}
