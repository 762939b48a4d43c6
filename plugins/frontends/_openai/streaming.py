"""Server-sent events: one for each token that makes text visible, in as few writes as possible.

Knows nothing of where tokens come from. What is the same in every event of a stream is encoded
once; a token costs one JSON string and one concatenation.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from core.frontend.asgi import Send
from core.frontend.errors import error_body
from plugins.frontends._openai.protocol import StreamOptions

HEADERS_S = 4.5  # from a request to the headers of its stream, unless its prompt takes longer
COMMENTS_S = 10.0  # between two looks at whether a stream is silent
COMMENT = b": keep-alive\n\n"  # every reader of server-sent events skips it
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_encode = msgspec.json.Encoder().encode


class EventStream:
    """The body of one streamed response.

    The response begins with the first write, so that what fails before still gets its status, or
    after HEADERS_S. While nothing else is to be said, comments keep proxies from giving up.
    """

    def __init__(self, send: Send, envelope: dict[str, Any], options: StreamOptions | None) -> None:
        """`envelope` is the part of every chunk before "choices"."""
        self._send = send
        self.started = False
        self._quiet = True  # nothing was written since the last look
        self._commenting = self._ending = False
        self.wants_usage = bool(options and options.include_usage)
        self.usage_in_all = bool(self.wants_usage and options and options.continuous_usage_stats)
        self._head = b"data: " + _encode(envelope)[:-1]
        self._null_usage = b',"usage":null' if self.wants_usage else b""

    async def write(self, events: bytes) -> None:
        self._quiet = False
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    @asynccontextmanager
    async def kept_alive(self, begin_s: float) -> AsyncIterator[None]:
        """Inside the block a comment is written wherever nothing else is for a while. `begin_s`:
        when the request came, by time.perf_counter()."""
        task = asyncio.get_running_loop().create_task(self._keep_alive(begin_s))
        try:
            yield
        finally:
            self._ending = True
            if self._commenting:  # it may have begun the response, and is to be whole
                await task
            task.cancel()

    async def _keep_alive(self, begin_s: float) -> None:
        await asyncio.sleep(begin_s + HEADERS_S - time.perf_counter())
        while True:
            if self._quiet:
                self._commenting = True
                await self.write(COMMENT)
                self._commenting = False
                if self._ending:
                    return
            self._quiet = True
            await asyncio.sleep(COMMENTS_S)

    async def end(self, events: bytes) -> None:
        """Write the last events."""
        if not self.started:
            await self.write(b"")
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def fail(self, error: Exception) -> None:
        """Say what went wrong and end: there is no [DONE] then."""
        await self.end(b"data: " + error_body(error) + b"\n\n")

    def event(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> bytes:
        """A chunk with one choice, whatever it holds."""
        return b'%b,"choices":[%b]%b}\n\n' % (self._head, _encode(choice), self._usage(usage))

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that ends a stream with include_usage."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage))

    def text_shape(self, index: int, before_text: bytes, after_text: bytes) -> "TextShape":
        """What surrounds the text in a choice's ordinary chunks."""
        head = b'%b,"choices":[{"index":%d,%b' % (self._head, index, before_text)
        return TextShape(head, after_text, self._null_usage)

    def _usage(self, usage: dict[str, Any] | None) -> bytes:
        if usage is None or not self.usage_in_all:
            return self._null_usage
        return b',"usage":' + _encode(usage)


class TextShape:
    """Makes the ordinary chunks of one choice."""

    __slots__ = ("_after", "_end", "_head", "_null_usage", "_tail")

    def __init__(self, head: bytes, after_text: bytes, null_usage: bytes) -> None:
        self._head = head
        self._null_usage = null_usage
        self._after = after_text + b',"logprobs":'
        self._end = b',"finish_reason":null}]'
        self._tail = self._after + b"null" + self._end + null_usage + b"}\n\n"

    def plain(self, texts: Iterable[str]) -> bytes:
        """A chunk for each text, without logprobs or usage."""
        head, tail, encode = self._head, self._tail, _encode
        return b"".join([head + encode(text) + tail for text in texts])

    def full(self, text: str, logprobs: Any, usage: dict[str, Any] | None) -> bytes:
        """One chunk with logprobs (None: null) and, where given, usage."""
        shown = self._null_usage if usage is None else b',"usage":' + _encode(usage)
        parts = [self._head, _encode(text), self._after, _encode(logprobs), self._end, shown]
        return b"".join([*parts, b"}\n\n"])
