"""The loop's mailboxes over ZeroMQ: msgpack-encoded structs of core.interfaces.messages.

Sockets are given as endpoints. Binding and connecting sides may start in either order.
"""

import time
from collections.abc import Sequence

import msgspec
import zmq

from core.interfaces.messages import (
    EngineInput,
    EngineStats,
    RequestOutput,
    StepOutput,
    StepPlan,
)

STATS_INTERVAL_S = 0.25
# A request is at most a prompt of the longest context, a few bytes a token.
MAX_INPUT_BYTES = 64 * 1024 * 1024


class ZmqInbox:
    """Requests of the frontend; binds `endpoint`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_INPUT_BYTES)
        self._socket.bind(endpoint)
        self._decoder = msgspec.msgpack.Decoder(EngineInput)

    def drain(self, *, wait: bool) -> list[EngineInput]:
        """Every message there is; with `wait`, blocks until there is one."""
        messages: list[EngineInput] = []
        if wait:
            messages.append(self._decoder.decode(self._socket.recv()))
        while True:
            try:
                messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages


class ZmqOutbox:
    """Outputs to the frontend; connects to `endpoint`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._stats: EngineStats | None = None
        self._next_stats_s = 0.0

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        """One message, if there is anything to say: outputs, or gauges that changed."""
        now = time.monotonic()
        idle = stats.num_running == 0 and stats.num_waiting == 0
        due = stats != self._stats and (idle or now >= self._next_stats_s)
        if not outputs and not due:
            return
        if due:
            self._stats, self._next_stats_s = stats, now + STATS_INTERVAL_S
        self._socket.send(self._encoder.encode(StepOutput(outputs, stats if due else None)))


class ZmqPlanSender:
    """Hands each plan to the other ranks of the group; connects to their endpoints."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Sequence[str]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._sockets = []
        for endpoint in endpoints:
            socket = context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(endpoint)
            self._sockets.append(socket)

    def send(self, plan: StepPlan) -> None:
        data = self._encoder.encode(plan)
        for socket in self._sockets:
            socket.send(data)


class ZmqPlanReceiver:
    """A follower's plans; binds `endpoint`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(endpoint)
        self._decoder = msgspec.msgpack.Decoder(StepPlan)

    def receive(self) -> StepPlan:
        return self._decoder.decode(self._socket.recv())
