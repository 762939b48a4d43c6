"""The engine client against a raw ZeroMQ peer."""

import asyncio

import msgspec
import pytest
import zmq
import zmq.asyncio

from core.errors import RequestError, WorkerDied
from core.interfaces.balancer import BalancerSpec
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
from core.plugin.hookspecs import NoOptions
from core.serve import engine_client
from core.serve.balancer import SoloBalancer
from core.serve.engine_client import STEPS_PER_WAKEUP, ZmqEngine
from core.serve.request_check import RequestLimits
from plugins.balancers.least_tokens import LeastTokens
from plugins.balancers.round_robin import RoundRobin
from tests.support.fake_engine import endpoints_in

SAMPLING = SamplingParams(max_tokens=4)
LIMITS = RequestLimits(vocab_size=100, max_model_len=64)


def make(cls, num_ranks):
    """A built-in balancer."""
    return cls(NoOptions(), BalancerSpec(num_ranks, block_tokens=64))


class Peer:
    """One scheduler's side, in the same event loop."""

    def __init__(self, endpoints, dp_rank=0):
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, str(dp_rank).encode())
        self._socket.connect(endpoints.engine)

    async def receive(self):
        frame = await asyncio.wait_for(self._socket.recv(), 5)
        return msgspec.msgpack.decode(frame, type=EngineInput)

    async def send(self, *outputs, stats=None):
        await self._socket.send(msgspec.msgpack.encode(StepOutput(list(outputs), stats)))

    async def send_raw(self, frame):
        await self._socket.send(frame)

    def close(self):
        self._context.destroy(linger=0)


def run(tmp_path, scenario, peer_first=True):
    """Run `scenario(engine, peer)`, both sides serving."""

    async def both_sides(engine, peer):
        engine.engine_ready({})
        await peer.send(stats=EngineStats(num_running=1))
        await until(lambda: engine.state is EngineState.SERVING)
        await scenario(engine, peer)

    run_dp(tmp_path, both_sides, num_dp=1, balancer=SoloBalancer(), peer_first=peer_first)


def run_dp(tmp_path, scenario, *, num_dp, balancer, peer_first=True, on_serving=lambda: None):
    """Run `scenario(engine, *peers)`; no peer has said anything."""
    endpoints = endpoints_in(tmp_path, num_dp)

    def make_peers():
        return [Peer(endpoints, dp_rank) for dp_rank in range(num_dp)]

    async def main():
        peers = make_peers() if peer_first else []
        engine = ZmqEngine(
            endpoints, asyncio.get_running_loop(), balancer, LIMITS, on_serving=on_serving
        )
        peers = peers or make_peers()
        try:
            assert engine.state is EngineState.STARTING
            async with asyncio.timeout(20):
                await scenario(engine, *peers)
        finally:
            engine.close()
            for peer in peers:
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


def test_requests_are_spread_and_aborted_where_they_run(tmp_path):
    async def scenario(engine, *peers):
        engine.engine_ready({})
        for dp_rank, peer in enumerate(peers):
            assert engine.state is EngineState.STARTING, "not every scheduler is there"
            await peer.send(stats=EngineStats(num_running=dp_rank + 1, kv_pages_total=10))
            await until(lambda rank=dp_rank: engine.stats_by_dp[rank].kv_pages_total == 10)
        assert engine.state is EngineState.SERVING
        assert (engine.stats.num_running, engine.stats.kv_pages_total) == (6, 30)
        streams = [engine.generate(name, [1], SAMPLING) for name in "abcde"]
        got = {
            dp_rank: [(await peer.receive()).request_id for _ in range(count)]
            for (dp_rank, peer), count in zip(enumerate(peers), (2, 2, 1), strict=True)
        }
        assert got == {0: ["a", "d"], 1: ["b", "e"], 2: ["c"]}
        streams[1].close()
        assert await peers[1].receive() == Abort(["b"])
        await peers[2].send(RequestOutput("c", [7], finish_reason="length"))
        assert (await anext(streams[2])).token_ids == [7]
        engine.fail_all(lambda: WorkerDied("enough"))
        assert await peers[0].receive() == Abort(["a", "d"])
        assert await peers[1].receive() == Abort(["e"])
        engine.generate("f", [1], SAMPLING)
        assert isinstance(await peers[2].receive(), Generate), "all of its requests had ended"

    run_dp(
        tmp_path,
        scenario,
        num_dp=3,
        balancer=make(RoundRobin, 3),
    )


@pytest.mark.parametrize("parent_first", [True, False])
def test_it_serves_once_facts_and_gauges_are_there_in_either_order(tmp_path, parent_first):
    """Nobody sees it serve with the facts, the limits or the gauges of an engine not yet known."""
    info = {"dtype": "float32", "max_model_len": 4}
    served = []

    async def scenario(engine, *peers):
        if parent_first:
            engine.engine_ready(info)
        for dp_rank, peer in enumerate(peers):
            assert engine.state is EngineState.STARTING
            with pytest.raises(RequestError, match="still being loaded"):
                engine.generate("early", [1], SAMPLING)
            await peer.send(stats=EngineStats(kv_pages_total=10))
            await until(lambda rank=dp_rank: engine.stats_by_dp[rank].kv_pages_total == 10)
        if not parent_first:
            assert engine.state is EngineState.STARTING, "the parent said nothing yet"
            engine.engine_ready(info)
        assert engine.state is EngineState.SERVING
        with pytest.raises(RequestError, match="allowed: 1 to 3"):
            engine.generate("long", [1] * 4, SAMPLING)
        engine.engine_ready(info)
        assert (engine.info, engine.stats.kv_pages_total) == (info, 20)
        assert served == ["once"]

    run_dp(
        tmp_path,
        scenario,
        num_dp=2,
        balancer=make(RoundRobin, 2),
        on_serving=lambda: served.append("once"),
    )


def test_the_balancer_hears_of_every_token_and_end(tmp_path):
    balancer = make(LeastTokens, 2)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)

    async def scenario(engine, *peers):
        engine.engine_ready({})
        for peer in peers:
            await peer.send(stats=EngineStats())
        await until(lambda: engine.state is EngineState.SERVING)
        streams = [engine.generate(name, [1] * 5, sampling) for name in "abc"]
        assert balancer.loads == [30, 15]
        await peers[0].send(RequestOutput("a", [1, 2]))
        await until(lambda: balancer.loads == [23, 15])
        streams[1].close()
        await until(lambda: balancer.loads == [23, 0])
        await peers[0].send(RequestOutput("a", [3], finish_reason="stop"))
        await until(lambda: balancer.loads == [15, 0])
        engine.engine_died("gone")
        assert balancer.loads == [0, 0]

    run_dp(tmp_path, scenario, num_dp=2, balancer=balancer)


def test_a_scheduler_that_cannot_be_reached_counts_as_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "UNREACHABLE_S", 0.05)

    async def scenario(engine, peer):
        gone = asyncio.get_running_loop().create_task(send_until_unreachable(engine, peer))
        stream = await gone
        with pytest.raises(WorkerDied, match="DP rank 0 can't be reached"):
            await anext(stream)
        assert engine.state is EngineState.DEAD

    async def send_until_unreachable(engine, peer):
        """ZeroMQ notices a connection's end in a thread of its own: until then it takes more."""
        peer.close()
        count = 0
        stream = engine.generate("0", [1], SAMPLING)
        while engine.alive:
            count += 1
            stream = engine.generate(str(count), [1], SAMPLING)
            await asyncio.sleep(0.02)
        return stream

    run(tmp_path, scenario)
