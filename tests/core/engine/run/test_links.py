"""Ranks over real sockets, each in a thread: frontend, leaders, followers, hub."""

import asyncio
import random
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from core.engine.run.expert_balance import NoExpertBalancer
from core.engine.run.links import LeaderLinks, open_links
from core.engine.run.mailbox import ZmqMailbox
from core.engine.schedule.pace import Pace
from core.engine.schedule.scheduler import Scheduler
from core.errors import ResourceError, WorkerDied
from core.interfaces.balancer import BalancerSpec
from core.interfaces.control import Endpoints
from core.interfaces.frontend import EngineState
from core.interfaces.messages import (
    AgreedStep,
    EngineStats,
    RequestOutput,
    SamplingParams,
    StepFacts,
    StepResult,
)
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.serve.engine_client import ZmqEngine
from core.serve.request_check import RequestLimits
from core.settings.config import EngineConfig
from core.wire import Wire
from plugins.balancers.least_tokens import LeastTokens
from tests.support.fake_engine import endpoints_in
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, expected_answer

PAGE_SIZE, NUM_PAGES, MAX_MODEL_LEN, EOS_IDS = 4, 40, 60, [0, 1]
TIMEOUT_S = 20.0


class Collectives:
    """A step is done once all ranks have launched it."""

    def __init__(self, world_size: int) -> None:
        self.launched: list[list[StepFacts]] = [[] for _ in range(world_size)]
        self.changed = threading.Condition()

    def launch(self, rank: int, facts: StepFacts) -> int:
        with self.changed:
            self.launched[rank].append(facts)
            self.changed.notify_all()
            return len(self.launched[rank])

    def wait(self, count: int) -> None:
        def everyone() -> bool:
            return all(len(steps) >= count for steps in self.launched)

        with self.changed:
            assert self.changed.wait_for(everyone, TIMEOUT_S), "a rank did not launch a step"


class FakeExecutor:
    """Stands for core.engine.run.executor.StepExecutor."""

    def __init__(self, collectives: Collectives, rank: int, dp_rank: int) -> None:
        self._collectives, self._rank, self._dp_rank = collectives, rank, dp_rank
        self._runner = FakeRunner(PAGE_SIZE, NUM_PAGES)
        self.pace = Pace()

    def launch(self, step: AgreedStep) -> Callable[[], StepResult]:
        count = self._collectives.launch(self._rank, step.facts)
        result = self._runner.run_agreed(step, self._dp_rank)

        def wait() -> StepResult:
            self._collectives.wait(count)
            return result

        return wait


class Rank(threading.Thread):
    """One rank, as core.worker runs it."""

    def __init__(self, endpoints: Endpoints, plan: Plan, rank: int, collectives: Collectives):
        super().__init__(name=f"rank {rank}", daemon=True)
        self._wire = Wire(endpoints.key)
        self._endpoints, self._plan, self._rank = endpoints, plan, rank
        self._collectives = collectives
        self.error: BaseException | None = None

    def run(self) -> None:
        plan, rank = self._plan, self._rank
        dp_rank = plan.axis_index("dp", rank)
        config = EngineConfig(page_size=PAGE_SIZE, max_running_requests=4)
        scheduler = Scheduler(
            config, num_pages=NUM_PAGES, max_model_len=MAX_MODEL_LEN, eos_ids=EOS_IDS
        )
        try:
            links = open_links(self._wire, self._endpoints, plan, rank, step_timeout_s=TIMEOUT_S)
            links.await_peers(TIMEOUT_S)
            executor = FakeExecutor(self._collectives, rank, dp_rank)
            links.serve(scheduler, executor, NoExpertBalancer())  # type: ignore[arg-type]
        except zmq.ContextTerminated:
            return
        except BaseException as error:
            if isinstance(error.__cause__, zmq.ContextTerminated):  # `stop`, in a round of leaders
                return
            self.error = error
            raise
        finally:
            for opened in self._wire._sockets:
                opened.close(linger=0)

    def stop(self) -> None:
        """End its blocking calls; it closes its sockets, which this waits for."""
        self._wire._context.term()
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        assert self.error is None


def tcp_endpoints(num_dp: int) -> Endpoints:
    with_ports = []
    for _ in range(2 + num_dp):
        opened = socket.create_server(("127.0.0.1", 0))
        with_ports.append(opened)
    engine, lockstep, *steps = (f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in with_ports)
    for opened in with_ports:
        opened.close()
    key = secrets.token_hex(32)
    return Endpoints(engine=engine, lockstep=lockstep, steps=steps, store="", key=key)


async def load(engine: ZmqEngine, seed: int, num_requests: int) -> None:
    """Requests in bursts; some are aborted, the others answered rightly; the engine falls idle."""
    draw = random.Random(seed)
    engine.engine_ready({})
    while engine.state is EngineState.STARTING:
        await asyncio.sleep(0.001)

    async def one(number: int) -> None:
        prompt = draw.choices(range(VOCAB_SIZE), k=draw.randint(1, 20))
        sampling = SamplingParams(max_tokens=draw.randint(1, 20), ignore_eos=draw.random() < 0.5)
        stream = engine.generate(str(number), prompt, sampling)
        patience = draw.choice([1, 1000, 1000, 1000])
        token_ids: list[int] = []
        async for output in stream:
            token_ids += output.token_ids
            if (patience := patience - 1) == 0:
                break
        else:
            right = expected_answer(prompt, sampling, eos_ids=EOS_IDS, max_len=MAX_MODEL_LEN)
            assert token_ids == right.token_ids
        stream.close()

    number = 0
    while number < num_requests:
        burst = range(number, number + draw.choice([1, 1, 3, 12]))
        number = burst.stop
        await asyncio.gather(*(one(n) for n in burst))


@pytest.mark.parametrize("over", ["ipc", "tcp"])
@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (3, 1), (2, 2)])
def test_requests_over_all_ranks(tmp_path: Path, over: str, dp: int, tp: int) -> None:
    endpoints = endpoints_in(tmp_path, dp) if over == "ipc" else tcp_endpoints(dp)
    plan = Plan(dp=dp, tp_attn=tp, tp_expert=dp * tp)
    collectives = Collectives(plan.world_size)
    ranks = [Rank(endpoints, plan, rank, collectives) for rank in range(plan.world_size)]

    async def main() -> EngineStats:
        balancer = LeastTokens(NoOptions(), BalancerSpec(dp, block_tokens=64))
        limits = RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
        engine = ZmqEngine(endpoints, asyncio.get_running_loop(), balancer, limits)
        try:
            async with asyncio.timeout(60):
                await load(engine, seed=dp, num_requests=120)
            assert all(stats.num_steps > 10 for stats in engine.stats_by_dp)
            return engine.stats
        finally:
            engine.close()

    for rank in ranks:
        rank.start()
    stats = asyncio.run(main())
    for rank in ranks:
        rank.stop()
    assert stats.num_steps > 100
    first, *others = collectives.launched
    assert len(first) > 100
    assert all(steps == first for steps in others)


def leader(endpoints: Endpoints, plan: Plan, rank: int, step_timeout_s: float = TIMEOUT_S):
    """The links of a leader, and what to close."""
    wire = Wire(endpoints.key)
    links = open_links(wire, endpoints, plan, rank, step_timeout_s=step_timeout_s)
    assert isinstance(links, LeaderLinks)
    return wire, links


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    endpoints = endpoints_in(tmp_path, 3)
    wires = []
    for plan, rank, missing in (
        (Plan(dp=3, tp_expert=3), 0, "DP rank 1, 2"),
        (Plan(dp=3, tp_attn=3, tp_expert=9), 3, "rank 4, 5"),
        (Plan(dp=3, tp_expert=3), 1, "DP rank 0"),
        (Plan(dp=1, tp_attn=2, tp_expert=2), 1, "the rank that schedules"),
    ):
        wire = Wire(endpoints.key)
        wires.append(wire)
        links = open_links(wire, endpoints, plan, rank, step_timeout_s=1)
        with pytest.raises(ResourceError, match=missing):
            links.await_peers(0.05)
        wire.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_scheduler_that_does_not_answer_is_named(tmp_path: Path, rank: int) -> None:
    endpoints, plan = endpoints_in(tmp_path, 2), Plan(dp=2, tp_expert=2)
    opened = [leader(endpoints, plan, peer, step_timeout_s=0.05) for peer in range(2)]
    waiting = threading.Thread(target=opened[1][1].await_peers, args=(TIMEOUT_S,))
    waiting.start()
    opened[0][1].await_peers(TIMEOUT_S)
    waiting.join()
    with pytest.raises(WorkerDied, match=f"DP rank {1 - rank} does not answer"):
        opened[rank][1].lockstep.agree(None, busy=False)
    for wire, _ in opened:
        wire.close()


def test_gauges_are_sent_when_they_change_and_not_too_often(tmp_path: Path) -> None:
    endpoints = endpoints_in(tmp_path)
    frontend, wire = Wire(), Wire()
    router = frontend.bind(endpoints.engine)
    mailbox = ZmqMailbox(wire, endpoints.engine, 0)

    def said() -> list[object]:
        _, frame = router.recv_multipart()
        decoded: list[object] = msgspec.msgpack.decode(frame)
        return decoded

    output = RequestOutput("a", [1])
    mailbox.send([], EngineStats())
    mailbox.send([], EngineStats())  # nothing new
    mailbox.send([output], EngineStats(num_running=1))  # too soon for gauges
    mailbox.send([], EngineStats(num_steps=2))  # idle: what stays true for long
    messages = [said() for _ in range(3)]
    assert [message["stats"] and message["stats"][6] for message in messages] == [0, None, 2]
    assert not router.poll(20)
    frontend.close()
    wire.close()
