"""The engine client against a raw ZeroMQ peer."""

import asyncio

import msgspec
import pytest
import zmq
import zmq.asyncio

from core.errors import RequestError, WorkerDied
from core.interfaces.control import Endpoints
from core.interfaces.frontend import EngineState
from core.interfaces.messages import (
    Abort,
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)
from core.serve.engine_client import STEPS_PER_WAKEUP, ZmqEngine

SAMPLING = SamplingParams(max_tokens=4)


class Peer:
    """The engine's side, in the same event loop."""

    def __init__(self, endpoints):
        self._context = zmq.asyncio.Context()
        self._input = self._context.socket(zmq.PULL)
        self._output = self._context.socket(zmq.PUSH)
        self._input.bind(endpoints.engine_input)
        self._output.connect(endpoints.engine_output)

    async def receive(self):
        frame = await asyncio.wait_for(self._input.recv(), 5)
        return msgspec.msgpack.decode(frame, type=EngineInput)

    async def send(self, *outputs, stats=None):
        await self._output.send(msgspec.msgpack.encode(StepOutput(list(outputs), stats)))

    async def send_raw(self, frame):
        await self._output.send(frame)

    def close(self):
        self._context.destroy(linger=0)


def run(tmp_path, scenario, peer_first=True):
    """Run `scenario(engine, peer)`, both sides serving."""
    endpoints = Endpoints(
        engine_input=f"ipc://{tmp_path}/i", engine_output=f"ipc://{tmp_path}/o", plans=[]
    )

    async def main():
        peer = Peer(endpoints) if peer_first else None
        engine = ZmqEngine(endpoints, asyncio.get_running_loop())
        peer = peer or Peer(endpoints)
        try:
            assert engine.state is EngineState.STARTING
            await peer.send(stats=EngineStats(num_running=1))
            await until(lambda: engine.state is EngineState.SERVING)
            async with asyncio.timeout(20):
                await scenario(engine, peer)
        finally:
            engine.close()
            peer.close()

    asyncio.run(main())


async def until(predicate):
    async with asyncio.timeout(5):
        while not predicate():
            await asyncio.sleep(0)


@pytest.mark.parametrize("peer_first", [True, False])
def test_a_request_goes_there_and_its_outputs_come_back(tmp_path, peer_first):
    async def scenario(engine, peer):
        stream = engine.generate("a", [1, 2], SAMPLING)
        assert await peer.receive() == Generate("a", [1, 2], SAMPLING)
        assert engine.num_live == 1
        await peer.send(RequestOutput("a", [5]), RequestOutput("unknown", [6]))
        assert (await anext(stream)).token_ids == [5]
        await peer.send(RequestOutput("a", [7], finish_reason="length"), stats=EngineStats(3))
        assert [output.token_ids async for output in stream] == [[7]]
        assert (engine.num_live, engine.stats.num_running) == (0, 3)
        stream.close()
        engine.generate("b", [1], SAMPLING)
        assert isinstance(await peer.receive(), Generate), "a finished request is not aborted"

    run(tmp_path, scenario, peer_first)


def test_unread_outputs_are_merged_in_order(tmp_path):
    entry = TokenLogprobs(1, -1.0, 1, [], [])

    async def scenario(engine, peer):
        stream = engine.generate("a", [1], SAMPLING)
        steps = 5 * STEPS_PER_WAKEUP
        await peer.send(RequestOutput("a", [0], logprobs=[entry], num_cached_tokens=9))
        for i in range(1, steps):
            await peer.send(RequestOutput("a", [i], logprobs=[entry]))
        last = RequestOutput("a", [steps], finish_reason="stop", stop_token_id=steps)
        await peer.send(last)
        await until(lambda: engine.num_live == 0)
        outputs = [output async for output in stream]
        assert len(outputs) == 1
        assert outputs[0].token_ids == list(range(steps + 1))
        assert (outputs[0].finish_reason, outputs[0].stop_token_id) == ("stop", steps)
        assert (outputs[0].num_cached_tokens, len(outputs[0].logprobs)) == (9, steps)

    run(tmp_path, scenario)


def test_closing_early_aborts_once_and_wakes_the_reader(tmp_path):
    async def scenario(engine, peer):
        stream = engine.generate("a", [1], SAMPLING)
        await peer.receive()
        reader = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        stream.close()
        stream.close()
        assert await reader is None
        assert await peer.receive() == Abort(["a"])
        engine.generate("b", [1], SAMPLING)
        assert isinstance(await peer.receive(), Generate)
        await peer.send(RequestOutput("a", [1]))  # it was under way: nobody's

    run(tmp_path, scenario)


def test_death_fails_every_stream_after_what_came_before(tmp_path):
    async def scenario(engine, peer):
        idle, busy = (engine.generate(name, [1], SAMPLING) for name in "ab")
        reader = asyncio.create_task(anext(idle))
        await peer.send(RequestOutput("b", [4]), stats=EngineStats(7))
        await until(lambda: engine.stats.num_running == 7)
        engine.engine_died("worker 3 is gone")
        with pytest.raises(WorkerDied, match="worker 3"):
            await reader
        assert (await anext(busy)).token_ids == [4]
        with pytest.raises(WorkerDied, match="worker 3"):
            await anext(busy)
        assert (engine.alive, engine.state, engine.num_live) == (False, EngineState.DEAD, 0)
        with pytest.raises(RequestError, match="worker 3") as caught:
            engine.generate("c", [1], SAMPLING)
        assert caught.value.status == 503
        engine.drain()
        assert engine.state is EngineState.DEAD

    run(tmp_path, scenario)


def test_draining_refuses_and_waits_for_what_runs(tmp_path):
    async def scenario(engine, peer):
        stream = engine.generate("a", [1], SAMPLING)
        engine.drain()
        with pytest.raises(RequestError, match="shutting down"):
            engine.generate("b", [1], SAMPLING)
        waiter = asyncio.create_task(engine.wait_idle())
        await asyncio.sleep(0)
        assert not waiter.done()
        await peer.send(RequestOutput("a", [1], finish_reason="length"))
        await asyncio.wait_for(waiter, 5)
        assert (await anext(stream)).finish_reason == "length"
        await engine.wait_idle()

    run(tmp_path, scenario)


def test_unreadable_messages_end_the_engine_not_the_process(tmp_path):
    async def scenario(engine, peer):
        stream = engine.generate("a", [1], SAMPLING)
        await peer.send_raw(b"\xff not msgpack")
        with pytest.raises(WorkerDied, match="unreadable"):
            await anext(stream)
        assert not engine.alive

    run(tmp_path, scenario)
