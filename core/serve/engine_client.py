"""The engine over ZeroMQ, as a frontend sees it. Knows nothing of HTTP or of text.

Every DP rank has a scheduler; the balancer says which one gets a request. One message of a
scheduler carries a whole step, so the cost per token is what counts: a step is decoded once, and
each output is put into its request's stream (`core.serve.answer_stream`).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
from msgspec.structs import astuple

from core.errors import NodeweaveError, RequestError, WorkerDied
from core.frontend.admission import queue_full
from core.interfaces.balancer import Balancer
from core.interfaces.control import Endpoints
from core.interfaces.frontend import EngineState
from core.interfaces.messages import (
    Abort,
    EngineInput,
    EngineStats,
    ExpertLoads,
    Generate,
    SamplingParams,
    StepOutput,
)
from core.interfaces.metrics import RequestMeter
from core.serve.answer_stream import AnswerStream
from core.serve.balancer import request_view
from core.serve.counts import Counts
from core.serve.request_check import RequestLimits
from core.wire import Wire, receive_from, send

STEPS_PER_WAKEUP = 8  # messages taken before other work of the event loop gets its turn
UNREACHABLE_S = 2.0  # until a scheduler whose connection is gone counts as dead
_REFUSALS = {
    EngineState.STARTING: ("the model is still being loaded; try again soon", "engine_starting"),
    EngineState.DRAINING: ("the server is shutting down", "shutting_down"),
}

log = logging.getLogger(__name__)


class ZmqEngine:
    """Implements core.interfaces.frontend.Engine. Lives in one event loop's thread.

    SERVING begins once the parent said that all workers are ready and every scheduler has sent its
    gauges: facts, limits and gauges are there then, and `on_serving` is called. Which side of a
    socket starts first does not matter.
    `limits` keep whatever could hurt a worker from being sent, whoever asks. A request that is not
    begun within `queue_timeout_s` ends with an error whose code is "queue_timeout"; 0: none does.
    Every answer is counted in `counts` as it is handed out. A request beyond `max_live` live ones
    is refused; None: the caller bounds them.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        loop: asyncio.AbstractEventLoop,
        balancer: Balancer,
        limits: RequestLimits,
        *,
        queue_timeout_s: float = 0.0,
        on_serving: Callable[[], None] = lambda: None,
        counts: Counts | None = None,
        max_live: int | None = None,
    ) -> None:
        self._loop = loop
        self._counts = counts or Counts()
        self._max_live = max_live
        self._balancer = balancer
        self._limits = limits
        self._queue_timeout_s = queue_timeout_s
        self._wire = Wire(endpoints.key)
        self._socket = self._wire.bind(endpoints.engine)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepOutput)
        self._streams: dict[str, AnswerStream] = {}
        self._on_serving = on_serving
        self._ranks = {str(rank): rank for rank in range(len(endpoints.steps))}
        self._unheard = set(self._ranks.values())  # DP ranks whose scheduler said nothing yet
        self._workers_ready = False
        self._stats_by_dp = [EngineStats() for _ in endpoints.steps]
        self._expert_loads: ExpertLoads | None = None
        self._info: dict[str, Any] = {}
        self._state = EngineState.STARTING
        self._cause = ""
        self._idle: asyncio.Future[None] | None = None
        self._socket_fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._socket_fd, self._on_readable)
        self._look_due = False
        self._look_soon()

    @property
    def alive(self) -> bool:
        return self._state is not EngineState.DEAD

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_live(self) -> int:
        return len(self._streams)

    @property
    def stats(self) -> EngineStats:
        return total_stats(self._stats_by_dp)

    @property
    def stats_by_dp(self) -> Sequence[EngineStats]:
        return self._stats_by_dp

    @property
    def expert_loads(self) -> ExpertLoads | None:
        return self._expert_loads

    @property
    def info(self) -> dict[str, Any]:
        return self._info

    def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        meter: RequestMeter | None = None,
    ) -> "AnswerStream":
        if self._state is not EngineState.SERVING:
            raise self._refusal()
        self._limits.check(request_id, prompt_ids, sampling, priority)
        if self._max_live is not None and len(self._streams) >= self._max_live:
            raise queue_full(len(self._streams), self._max_live)
        if request_id in self._streams:
            raise RequestError(
                f"a request with the id {request_id!r} is live; ids are unique among those",
                param="request_id",
                code="duplicate_request_id",
            )
        view = request_view(request_id, prompt_ids, sampling, priority)
        dp_rank = self._balancer.add(view, self._stats_by_dp)
        of_request = self._counts.begin() if meter is None else meter
        stream = AnswerStream(
            request_id, dp_rank, self._loop, self._counts, of_request, self._forget
        )
        if meter is None:
            of_request.release()  # the answer is the whole request
        self._streams[request_id] = stream
        message = Generate(request_id, prompt_ids, sampling, priority, self._queue_timeout_s)
        self._send(dp_rank, message)
        return stream

    def engine_ready(self, info: dict[str, Any]) -> None:
        """Every worker is up; `info` is what the first one said of itself."""
        self._info = info
        self._limits = self._limits.at_most(info.get("max_model_len"))
        self._workers_ready = True
        self._begin_serving()

    def drain(self) -> None:
        """Refuse new requests from now on."""
        if self.alive:
            self._state = EngineState.DRAINING

    async def wait_idle(self) -> None:
        """Return when no request is live. For one waiter."""
        while self._streams:
            self._idle = self._loop.create_future()
            await self._idle

    def engine_died(self, cause: str) -> None:
        """Fail every open stream now, and every request from now on."""
        if self.alive:
            self._state = EngineState.DEAD
            self._cause = cause
            self.fail_all(lambda: WorkerDied(cause))

    def fail_all(self, make_error: Callable[[], NodeweaveError]) -> None:
        """End every open stream with an error of its own, and its request."""
        streams, self._streams = self._streams, {}
        by_dp: dict[int, list[str]] = {}
        for request_id, stream in streams.items():
            self._balancer.remove(request_id, finished=False)
            by_dp.setdefault(stream.dp_rank, []).append(request_id)
        if self.alive:
            for dp_rank, request_ids in by_dp.items():
                self._send(dp_rank, Abort(request_ids))
        for stream in streams.values():
            stream.fail(make_error())
        self._check_idle()

    def close(self) -> None:
        """Release the sockets; call after the last request."""
        self._loop.remove_reader(self._socket_fd)
        self._wire.close()

    def _refusal(self) -> RequestError:
        if self._state is EngineState.DEAD:
            return RequestError(
                f"the engine has stopped: {self._cause}"[:500], code="engine_dead", status=503
            )
        message, code = _REFUSALS[self._state]
        return RequestError(message, code=code, status=503)

    def _send(self, dp_rank: int, message: EngineInput) -> None:
        try:
            send(self._socket, self._encoder.encode(message), to=str(dp_rank))
        except zmq.ZMQError as error:
            cause = f"the scheduler of DP rank {dp_rank} can't be reached: {error.strerror}"
            # The parent, who knows more, will say so sooner if a worker is gone.
            self._loop.call_later(UNREACHABLE_S, self.engine_died, cause)
        self._look_soon()

    def _forget(self, request_id: str) -> None:
        """A reader closed its stream: abort unless the request ended by itself."""
        if (stream := self._streams.pop(request_id, None)) is not None:
            self._balancer.remove(request_id, finished=False)
            if self.alive:
                self._send(stream.dp_rank, Abort([request_id]))
            self._check_idle()

    def _check_idle(self) -> None:
        if not self._streams and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _begin_serving(self) -> None:
        """Once nothing is missing any more."""
        complete = self._workers_ready and not self._unheard
        if complete and self._state is EngineState.STARTING:
            self._state = EngineState.SERVING
            self._on_serving()

    def _look_soon(self) -> None:
        """Look for messages in the next turn of the event loop. The descriptor tells changes only,
        and using the socket for anything takes the news that something has come."""
        if not self._look_due:
            self._look_due = True
            self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        self._look_due = False
        if self._socket.closed:
            return
        for _ in range(STEPS_PER_WAKEUP):
            try:
                name, message = receive_from(self._socket, zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                dp_rank = self._ranks[name]
                step = self._decoder.decode(message)
            except Exception as error:  # RecursionError of deep ones, say: no step was understood
                log.error("the engine sent a message that can't be read: %r", error)
                self.engine_died(f"unreadable message from the engine: {error}")
                return
            self._dispatch(dp_rank, step)
        self._look_soon()

    def _dispatch(self, dp_rank: int, step: StepOutput) -> None:
        if step.stats is not None:
            self._stats_by_dp[dp_rank] = step.stats
            if dp_rank in self._unheard:
                self._unheard.remove(dp_rank)
                self._begin_serving()
        if step.expert_loads is not None:
            self._expert_loads = step.expert_loads
        streams, balancer = self._streams, self._balancer
        ended = False
        for output in step.outputs:
            request_id = output.request_id
            stream = streams.get(request_id)
            if stream is None:
                continue  # aborted; the engine has not heard of it yet
            balancer.progress(request_id, len(output.token_ids))
            stream.put(output)
            if output.finish_reason is not None:
                del streams[request_id]
                balancer.remove(request_id, finished=True)
                ended = True
        if ended:
            self._check_idle()


def total_stats(by_dp: Sequence[EngineStats]) -> EngineStats:
    """The sum of several schedulers' gauges and counters."""
    if len(by_dp) == 1:
        return by_dp[0]
    return EngineStats(*(sum(values) for values in zip(*map(astuple, by_dp), strict=True)))
