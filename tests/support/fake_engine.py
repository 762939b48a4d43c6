"""A DP rank without a model: speaks the messages of core.interfaces.messages over ZeroMQ.

As a thread in tests (`FakeEngine`), or as a process for benchmarks:

    python -m tests.support.fake_engine --endpoint ipc://a --steps-per-second 300
"""

import argparse
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from core.interfaces.control import Endpoints
from core.interfaces.messages import (
    Abort,
    EngineInput,
    EngineStats,
    ExpertLoads,
    Generate,
    RequestOutput,
    StepOutput,
    TokenLogprobs,
)
from core.wire import receive


def endpoints_in(folder: Path | str, num_dp: int = 1) -> Endpoints:
    """Of an engine with so many DP ranks, in a folder with a short name."""
    return Endpoints(
        engine=f"ipc://{folder}/engine",
        lockstep=f"ipc://{folder}/lockstep",
        steps=[f"ipc://{folder}/steps-{dp_rank}" for dp_rank in range(num_dp)],
        store=f"{folder}/store",
    )


Reply = Callable[[Generate], Sequence[int] | str]  # text: the engine gives the request up


class QueueTimeout(str):
    """A reply: the request waited too long, for this reason."""

    __slots__ = ()


class FakeEngine:
    """One step a turn, one token a live request. A reply that ends before max_tokens is
    followed by the end-of-sequence token; `ignore_eos` repeats it."""

    def __init__(
        self, endpoints: Endpoints, reply: Reply, eos_id: int = 2, dp_rank: int = 0
    ) -> None:
        self.reply = reply
        self.eos_id = eos_id
        self.seen: list[Generate] = []
        self.aborted: set[str] = set()
        self.live: dict[str, tuple[Generate, Sequence[int] | str, int]] = {}
        self.changed = threading.Condition()  # guards the four above
        self.stepping = threading.Event()  # cleared: requests are taken in, no step is made
        self.stepping.set()
        self.permits: threading.Semaphore | None = None  # one for each step, where they are given
        self.steps_per_second = 0.0  # 0: as fast as it can
        self.expert_loads: ExpertLoads | None = None  # sent along with the gauges
        self._steps = 0
        self._stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, str(dp_rank).encode())
        self._socket.setsockopt(zmq.SNDHWM, 64)
        self._socket.connect(endpoints.engine)
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._encoder = msgspec.msgpack.Encoder()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def start(self) -> "FakeEngine":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join(10)
        self._context.destroy(linger=0)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Block until the predicate holds; fails the test where it never does."""
        with self.changed:
            assert self.changed.wait_for(predicate, timeout_s), "the engine never got there"

    def run(self) -> None:
        self._send([], self._stats())
        next_step_s = time.monotonic()
        while not self._stopping:
            busy = bool(self.live) and self.stepping.is_set()
            while self._socket.poll(0 if busy else 5):
                self._take(self._decoder.decode(receive(self._socket)))
                busy = True
            if self.live and self.stepping.is_set() and self._permitted():
                self._step()
                if self.steps_per_second:
                    next_step_s = max(next_step_s + 1 / self.steps_per_second, time.monotonic() - 1)
                    time.sleep(max(next_step_s - time.monotonic(), 0))

    def _permitted(self) -> bool:
        return self.permits is None or self.permits.acquire(timeout=0.005)

    def _take(self, message: Generate | Abort) -> None:
        with self.changed:
            if isinstance(message, Abort):
                self.aborted.update(message.request_ids)
                for request_id in message.request_ids:
                    self.live.pop(request_id, None)
            else:
                self.seen.append(message)
                self.live[message.request_id] = (message, self.reply(message), 0)
            self.changed.notify_all()

    def _step(self) -> None:
        outputs = []
        with self.changed:
            for request_id, (request, tokens, position) in list(self.live.items()):
                output = self._advance(request, tokens, position)
                outputs.append(output)
                if output.finish_reason is None:
                    self.live[request_id] = (request, tokens, position + 1)
                else:
                    del self.live[request_id]
            self.changed.notify_all()
        self._steps += 1
        due = self._steps % 64 == 0 or not self.live
        self._send(outputs, self._stats() if due else None)

    def _advance(
        self, request: Generate, tokens: Sequence[int] | str, position: int
    ) -> RequestOutput:
        sampling = request.sampling
        if isinstance(tokens, str):
            code = "queue_timeout" if isinstance(tokens, QueueTimeout) else None
            return RequestOutput(
                request.request_id, [], finish_reason="error", error=str(tokens), error_code=code
            )
        output = RequestOutput(request.request_id, [])
        if position == 0:
            output.num_cached_tokens = 0
            if sampling.prompt_logprobs is not None:
                output.prompt_logprobs = [
                    self._logprobs(token_id, index, sampling.prompt_logprobs)
                    for index, token_id in enumerate(request.prompt_ids[1:])
                ]
        if sampling.max_tokens == 0:
            output.finish_reason = "length"
            return output
        at_end = position >= len(tokens)
        token_id = (
            self.eos_id if at_end and not sampling.ignore_eos else tokens[position % len(tokens)]
        )
        output.token_ids = [token_id]
        if sampling.logprobs is not None:
            output.logprobs = [self._logprobs(token_id, position, sampling.logprobs)]
        if token_id in sampling.stop_token_ids or (at_end and not sampling.ignore_eos):
            output.finish_reason, output.stop_token_id = "stop", token_id
        elif position + 1 >= sampling.max_tokens:
            output.finish_reason = "length"
        return output

    @staticmethod
    def _logprobs(token_id: int, position: int, num_top: int) -> TokenLogprobs:
        """Made up: -0.1, -0.2... by position; the chosen token is the best of the top."""
        logprob = -(position + 1) / 10
        top = [(token_id + i, logprob - i) for i in range(num_top)]
        return TokenLogprobs(token_id, logprob, 1, [i for i, _ in top], [p for _, p in top])

    def _stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.live), kv_pages_total=100, num_steps=self._steps)

    def _send(self, outputs: list[RequestOutput], stats: EngineStats | None) -> None:
        loads = None if stats is None else self.expert_loads
        data = self._encoder.encode(StepOutput(outputs, stats, loads))
        while not self._stopping:
            try:
                self._socket.send(data, zmq.NOBLOCK)
                return
            except zmq.Again:
                self._socket.poll(20, zmq.POLLOUT)


def main() -> None:
    """Random tokens for everybody, until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--token-ids", required=True, help="to draw from, separated by commas")
    parser.add_argument("--steps-per-second", type=float, default=0.0)
    arguments = parser.parse_args()
    draw = random.Random(0)
    tokens = draw.choices([int(i) for i in arguments.token_ids.split(",")], k=4096)
    endpoints = Endpoints(engine=arguments.endpoint, lockstep="", steps=[], store="")
    engine = FakeEngine(endpoints, lambda _: tokens)
    engine.steps_per_second = arguments.steps_per_second
    engine.run()


if __name__ == "__main__":
    main()
