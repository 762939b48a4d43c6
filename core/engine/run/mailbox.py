"""What a rank says and hears over ZeroMQ: requests and outputs, scheduled steps, the lockstep.

Knows nothing of what is done with them. Sockets belong to the loop's thread; either side of a link
may start first.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import zmq

from core.engine.run.lockstep import HubMessage, RankFacts
from core.errors import WorkerDied
from core.interfaces.messages import (
    AgreedStep,
    EngineInput,
    EngineStats,
    ExpertLoads,
    RequestOutput,
    StepOutput,
)
from core.wire import (
    Socket,
    Wire,
    await_answer,
    await_hellos,
    receive,
    receive_from,
    say_hello,
    send,
)

STATS_INTERVAL_S = 0.25
_ONE_WAIT_S = 1.0


class ZmqMailbox:
    """A leader's link to the frontend: inbox and outbox. The first gauges tell it we are here."""

    def __init__(self, wire: Wire, endpoint: str, dp_rank: int) -> None:
        self.socket = wire.connect(endpoint, str(dp_rank))
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._encoder = msgspec.msgpack.Encoder()
        self._stats: EngineStats | None = None
        self._next_stats_s = 0.0

    def drain(self) -> list[EngineInput]:
        """Every message there is; does not wait."""
        messages: list[EngineInput] = []
        while True:
            try:
                messages.append(self._decoder.decode(receive(self.socket, zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        """One message, if there is anything to say: outputs, or gauges that changed."""
        now = time.monotonic()
        idle = stats.num_running == 0 and stats.num_waiting == 0
        due = stats != self._stats and (idle or now >= self._next_stats_s)
        if not outputs and not due:
            return
        if due:
            self._stats, self._next_stats_s = stats, now + STATS_INTERVAL_S
        if any(output.prompt_logprobs is not None for output in outputs):
            outputs = self._send_large(outputs)
        send(self.socket, self._encoder.encode(StepOutput(outputs, stats if due else None)))

    def _send_large(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Send each output that has prompt logprobs in a message of its own, as one alone may be
        tens of MB; returns the others."""
        others = []
        for output in outputs:
            if output.prompt_logprobs is None:
                others.append(output)
            else:
                send(self.socket, self._encoder.encode(StepOutput([output])))
        return others

    def send_expert_loads(self, loads: ExpertLoads | None) -> None:
        """A message of its own, if there are any."""
        if loads is not None:
            send(self.socket, self._encoder.encode(StepOutput([], None, loads)))


class ZmqStepSender:
    """Hands each step to the other ranks of the leader's group, who connect here."""

    def __init__(self, wire: Wire, endpoint: str, followers: Sequence[int]) -> None:
        self._socket = wire.bind(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._ranks = {str(rank): rank for rank in followers}

    def await_peers(self, timeout_s: float) -> None:
        """Until every follower is there. Raises ResourceError naming those who are not, WorkerDied
        where one came and is gone."""
        with _missing(*self._ranks.values()):
            await_hellos(self._socket, self._ranks, timeout_s=timeout_s, whose="rank")

    def send(self, step: AgreedStep) -> None:
        """Raises WorkerDied where a follower is gone."""
        data = self._encoder.encode(step)
        for name, rank in self._ranks.items():
            with _missing(rank):
                send(self._socket, data, to=name)


class ZmqStepReceiver:
    """A follower's steps."""

    def __init__(self, wire: Wire, endpoint: str, rank: int) -> None:
        self._socket = wire.connect(endpoint, str(rank))
        self._decoder = msgspec.msgpack.Decoder(AgreedStep)
        say_hello(self._socket)

    def await_peers(self, timeout_s: float) -> None:
        """Until the leader has heard of all its followers. Raises ResourceError."""
        await_answer(self._socket, timeout_s=timeout_s, whose="the rank that schedules")

    def receive(self) -> AgreedStep:
        return self._decoder.decode(receive(self._socket))


class ZmqHubLinks:
    """The hub's links to the leaders of the other DP ranks, who connect here."""

    def __init__(
        self, wire: Wire, endpoint: str, leaders: Sequence[int], *, answer_s: float
    ) -> None:
        """`leaders`: the ranks that schedule, by DP rank."""
        self.socket = wire.bind(endpoint)
        self._leaders = leaders
        self._names = [str(dp_rank) for dp_rank in range(1, len(leaders))]
        self._answer_s = answer_s
        self._decoder = msgspec.msgpack.Decoder(RankFacts)
        self._encoder = msgspec.msgpack.Encoder()

    def await_peers(self, timeout_s: float) -> None:
        """Until every other leader is there. Raises ResourceError naming those who are not,
        WorkerDied where one came and is gone."""
        with _missing(*self._leaders[1:]):
            await_hellos(self.socket, self._names, timeout_s=timeout_s, whose="DP rank")

    def send(self, dp_rank: int, message: HubMessage) -> None:
        with _missing(self._leaders[dp_rank]):
            send(self.socket, self._encoder.encode(message), to=str(dp_rank))

    def receive(self) -> tuple[int, RankFacts]:
        _wait(self.socket, self._answer_s)
        name, message = receive_from(self.socket)
        return int(name), self._decoder.decode(message)


class ZmqHubLink:
    """Another leader's link to the hub."""

    def __init__(self, wire: Wire, endpoint: str, dp_rank: int, *, answer_s: float) -> None:
        self.socket = wire.connect(endpoint, str(dp_rank))
        self._answer_s = answer_s
        self._decoder: msgspec.msgpack.Decoder[HubMessage] = msgspec.msgpack.Decoder(HubMessage)
        self._encoder = msgspec.msgpack.Encoder()
        say_hello(self.socket)

    def await_peers(self, timeout_s: float) -> None:
        """Until the hub has heard of all DP ranks. Raises ResourceError."""
        await_answer(self.socket, timeout_s=timeout_s, whose="the scheduler of DP rank 0")

    def send(self, facts: RankFacts) -> None:
        send(self.socket, self._encoder.encode(facts))

    def receive(self) -> HubMessage:
        _wait(self.socket, self._answer_s)
        return self._decoder.decode(receive(self.socket))


@contextmanager
def _missing(*ranks: int) -> Iterator[None]:
    """Around sending to some ranks: where one is gone, that is what ends this one."""
    try:
        yield
    except zmq.ZMQError as error:
        names = " or ".join(str(rank) for rank in ranks)
        raise WorkerDied(f"rank {names} can't be reached: {error.strerror}", ranks=ranks) from error


def _wait(socket: Socket, timeout_s: float) -> None:
    """Until there is a message. Time in which this process did not run (`docker pause`) counts as
    one short wait: the others did not run then either."""
    waited_s = 0.0
    while waited_s < timeout_s:
        wait_s = min(timeout_s - waited_s, _ONE_WAIT_S)
        if socket.poll(max(int(wait_s * 1000), 1)):
            return
        waited_s += wait_s
    raise TimeoutError(f"{timeout_s:g} s passed")
