"""The outputs of one request on their way to one reader, counted as they are read.

Knows nothing of sockets. No tasks and no queue: outputs that wait unread are merged, and a reader
that waits is woken through a bare future.
"""

import asyncio
from collections.abc import Callable
from time import perf_counter

from core.errors import NodeweaveError
from core.interfaces.messages import RequestOutput
from core.interfaces.metrics import RequestMeter
from core.serve.counts import Counts


class AnswerStream:
    """Implements core.interfaces.frontend.OutputStream: one slot and at most one waiting reader."""

    __slots__ = (
        "_done", "_error", "_finish_reason", "_forget", "_last_s", "_loop", "_meter", "_observe",
        "_pending", "_request_id", "_waiter", "dp_rank",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        dp_rank: int,
        loop: asyncio.AbstractEventLoop,
        counts: Counts,
        meter: RequestMeter,
        forget: Callable[[str], None],
    ) -> None:
        """`dp_rank` is where the request runs. `forget` is called with its id when it is closed."""
        self.dp_rank = dp_rank
        self._request_id = request_id
        self._loop = loop
        self._observe = counts.next_token_s.observe
        self._forget = forget
        self._pending: RequestOutput | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: NodeweaveError | None = None
        self._done = False
        self._finish_reason: str | None = None  # "" once it was counted
        self._last_s = 0.0  # when an output was read last; 0: none was yet
        self._meter = meter
        meter.hold()

    def __aiter__(self) -> "AnswerStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            output = self._pending
            if output is not None:
                self._pending = None
                reason = output.finish_reason
                if reason is not None:
                    self._done = True
                    self._finish_reason = reason
                if reason != "error":  # that is no token, however long it was waited for
                    now_s = perf_counter()
                    if self._last_s:
                        num_tokens = len(output.token_ids) or 1
                        self._observe((now_s - self._last_s) / num_tokens, num_tokens)
                    else:
                        self._meter.first_token(now_s)
                    self._last_s = now_s
                return output
            if self._error is not None:
                self._count("error")
                raise self._error
            if self._done:
                self._count(None)
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter

    def close(self, finish_reason: str | None = None) -> None:
        self._done = True
        self._pending = None
        self._count(finish_reason)
        self._wake()
        self._forget(self._request_id)

    def _count(self, reason: str | None) -> None:
        """How the answer ended: as its reader says, else the engine, else it was not read on."""
        if self._finish_reason != "":
            self._meter.finish(reason or self._finish_reason or "abort")
            self._finish_reason = ""

    def put(self, output: RequestOutput) -> None:
        """What a step gave."""
        if self._pending is None:
            self._pending = output
            self._wake()
        else:
            _merge(self._pending, output)

    def fail(self, error: NodeweaveError) -> None:
        """Raise this to whoever reads."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


def _merge(first: RequestOutput, second: RequestOutput) -> None:
    """Append what a later step adds to an output nobody has read yet."""
    first.token_ids += second.token_ids
    if second.logprobs is not None:
        first.logprobs = (first.logprobs or []) + second.logprobs
    first.finish_reason = second.finish_reason
    first.stop_token_id = second.stop_token_id
    first.error = second.error
    if second.prompt_logprobs is not None:
        first.prompt_logprobs = second.prompt_logprobs
    if second.num_cached_tokens is not None:
        first.num_cached_tokens = second.num_cached_tokens
