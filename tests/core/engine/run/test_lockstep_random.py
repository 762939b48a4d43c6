"""The lockstep under chance: real loops, schedulers and hub, in every interleaving of their threads
and messages that a seed can draw. A step ends when all ranks launched it, as in collectives."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.engine.run.lockstep import (
    HubLockstep,
    HubMessage,
    Lockstep,
    PeerLockstep,
    RankFacts,
    SoloLockstep,
)
from core.engine.run.loop import LONG_STEP_S, EngineLoop, follow
from core.engine.schedule.pace import Pace
from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import (
    Abort,
    AgreedStep,
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
    StepFacts,
    StepResult,
)
from core.settings.config import EngineConfig
from tests.support.fake_runner import VOCAB_SIZE, Expected, FakeRunner, expected_answer
from tests.support.interleave import Deadlock, World

EOS_IDS = [0, 1]
MAX_MODEL_LEN = 40


class Link:
    """Ordered messages one way, which take their time."""

    def __init__(self, network: "Network") -> None:
        self._network = network
        self.under_way: deque[Any] = deque()
        self.arrived: deque[Any] = deque()
        network.links.append(self)

    def send(self, message: Any) -> None:
        self.under_way.append(message)

    def receive(self, what: str) -> Any:
        self._network.world.wait_until(lambda: self.arrived, what)
        return self.arrived.popleft()


class Network:
    """A thread that brings the next message of some link."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.links: list[Link] = []
        world.spawn("network", self._run)

    def _run(self) -> None:
        while True:
            self.world.wait_until(
                lambda: any(link.under_way for link in self.links), "messages to carry"
            )
            busy = [link for link in self.links if link.under_way]
            link = self.world.random.choice(busy)
            link.arrived.append(link.under_way.popleft())


class Collectives:
    """What every rank launched; a step is done once all ranks have launched it."""

    def __init__(self, world: World, world_size: int) -> None:
        self.world = world
        self.launched: list[list[StepFacts]] = [[] for _ in range(world_size)]

    def launch(self, rank: int, facts: StepFacts) -> Callable[[], None]:
        self.launched[rank].append(facts)
        index = len(self.launched[rank]) - 1
        for peer in self.launched:
            assert len(peer) <= index or peer[index] == facts, "ranks run different steps"

        def wait() -> None:
            self.world.wait_until(
                lambda: all(len(steps) > index for steps in self.launched),
                f"rank {rank}'s step {index}",
            )

        return wait


class FakeExecutor:
    """Stands for core.engine.run.executor.StepExecutor."""

    def __init__(self, collectives: Collectives, rank: int, dp_rank: int, runner: FakeRunner):
        self._collectives = collectives
        self._rank, self._dp_rank = rank, dp_rank
        self._runner = runner
        self._decodes_follow = False  # as the last step's plan said
        self.num_running = 0
        # Where steps take long a leader waits for one before it plans the next.
        self.pace = collectives.world.random.choice([Pace(), Pace(token_s=LONG_STEP_S)])

    def launch(self, step: AgreedStep) -> Callable[[], StepResult]:
        done = self._collectives.launch(self._rank, step.facts)
        result = self._runner.run_agreed(step, self._dp_rank)
        assert self._decodes_follow or not step.scheduled.num_decodes, (
            "decodes that nobody foretold"
        )
        self._decodes_follow = step.scheduled.decodes_follow
        self.num_running += 1
        assert self.num_running <= 2, "launched far ahead of what is done"

        def wait() -> StepResult:
            done()
            self.num_running -= 1
            return result

        return wait


class HubEnds:
    """core.engine.run.lockstep.HubLinks."""

    def __init__(self, up: Link, down: dict[int, Link]) -> None:
        self.up, self._down = up, down

    def send(self, dp_rank: int, message: HubMessage) -> None:
        self._down[dp_rank].send(message)

    def receive(self) -> tuple[int, RankFacts]:
        dp_rank, facts = self.up.receive("facts at the hub")
        return dp_rank, facts


class PeerEnds:
    """core.engine.run.lockstep.HubLink."""

    def __init__(self, dp_rank: int, up: Link, down: Link) -> None:
        self._dp_rank, self._up, self.down = dp_rank, up, down

    def send(self, facts: RankFacts) -> None:
        self._up.send((self._dp_rank, facts))

    def receive(self) -> HubMessage:
        message: HubMessage = self.down.receive(f"the hub's answer at DP rank {self._dp_rank}")
        return message


@dataclass
class Live:
    expected: Expected
    dp_rank: int
    token_ids: list[int] = field(default_factory=list)


class Leader:
    """One DP rank: its loop, and the frontend's end of its inbox and outbox."""

    def __init__(self, engine: "Engine", dp_rank: int, lockstep: Lockstep, wake: Link | None):
        world, config = engine.world, engine.config
        self.scheduler = Scheduler(
            config,
            num_pages=engine.num_pages,
            max_model_len=MAX_MODEL_LEN,
            eos_ids=EOS_IDS,
            dp_rank=dp_rank,
            headroom_tokens=1,
            mixed_tokens=engine.mixed_tokens,
        )
        self.inbox: deque[EngineInput] = deque()
        self._engine = engine
        self.num_parked = 0
        ranks = range(dp_rank * engine.tp, (dp_rank + 1) * engine.tp)
        executors = [
            FakeExecutor(
                engine.collectives, rank, dp_rank, FakeRunner(config.page_size, engine.num_pages)
            )
            for rank in ranks
        ]
        self._plans = [Link(engine.network) for _ in ranks[1:]]

        def wait_for_work() -> None:
            self.num_parked += 1
            assert all(executor.num_running == 0 for executor in executors[:1])
            world.wait_until(
                lambda: self.inbox or (wake is not None and wake.arrived),
                f"work at DP rank {dp_rank}",
            )

        loop = EngineLoop(
            scheduler=self.scheduler,
            executor=executors[0],  # type: ignore[arg-type]
            inbox=self,
            outbox=self,
            followers=self,  # type: ignore[arg-type]
            lockstep=lockstep,
            wait_for_work=wait_for_work,
        )
        world.spawn(f"leader {dp_rank}", loop.run)
        for executor, plans in zip(executors[1:], self._plans, strict=True):
            receiver = _Receiver(plans)
            world.spawn(
                f"follower of {dp_rank}",
                lambda executor=executor, receiver=receiver: follow(executor, receiver),
            )

    def drain(self) -> list[EngineInput]:
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, *said: Any) -> None:
        """As outbox (outputs, stats), or as the followers' plan sender (step)."""
        match said:
            case (list(outputs), EngineStats()):
                self._engine.take(outputs)
            case (AgreedStep() as step,):
                for plans in self._plans:
                    plans.send(step)
        self._engine.world.pause()


class _Receiver:
    def __init__(self, plans: Link) -> None:
        self._plans = plans

    def receive(self) -> AgreedStep:
        step: AgreedStep = self._plans.receive("the leader's next step")
        return step


class Engine:
    """All ranks of dp x tp, and a frontend that sends, aborts and waits as chance has it."""

    def __init__(self, seed: int, dp: int, tp: int) -> None:
        self.world = World(seed)
        draw = self.world.random
        self.tp = tp
        self.config = EngineConfig(
            page_size=draw.choice([1, 2, 4]),
            max_running_requests=draw.randint(1, 5),
            chunked_prefill_size=draw.choice([-1, 2, 5, 100]),
            max_prefill_tokens=draw.choice([3, 8, 100]),
            disable_prefix_cache=draw.random() < 0.3,
        )
        self.mixed_tokens = draw.choice([None, 1, 3])
        self.pool_tokens = draw.choice([16, 40, 120]) // self.config.page_size
        self.pool_tokens *= self.config.page_size
        self.num_pages = 1 + self.pool_tokens // self.config.page_size
        self.collectives = Collectives(self.world, dp * tp)
        self.network = Network(self.world)
        self.live: dict[str, Live] = {}
        self.num_requests = 0
        up = Link(self.network)
        down = {dp_rank: Link(self.network) for dp_rank in range(1, dp)}
        hub: Lockstep = HubLockstep(HubEnds(up, down), range(dp)) if dp > 1 else SoloLockstep()
        self.leaders = [Leader(self, 0, hub, up)]
        for dp_rank, link in down.items():
            peer = PeerLockstep(PeerEnds(dp_rank, up, link), 0)
            self.leaders.append(Leader(self, dp_rank, peer, link))

    def run(self, num_actions: int) -> int:
        """Returns how many steps were run."""
        self.world.run("frontend", lambda: self._frontend(num_actions))
        first, *others = self.collectives.launched
        assert all(steps == first for steps in others)
        for leader in self.leaders:
            leader.scheduler.check()
            assert not leader.scheduler.has_work
        return len(first)

    def _frontend(self, num_actions: int) -> None:
        draw = self.world.random
        for _ in range(num_actions):
            action = draw.random()
            if action < 0.45:
                self._submit()
            elif action < 0.55:
                self._abort()
            elif action < 0.65:
                self.world.wait_until(lambda: not self.live, "all answers")
            else:
                for _ in range(draw.randint(1, 100)):
                    self.world.pause()
        self.world.wait_until(lambda: not self.live, "the last answers")
        for leader in self.leaders:
            leader.inbox.append(Abort(["never seen"]))
        self.world.wait_until(lambda: not any(leader.inbox for leader in self.leaders), "a round")
        for _ in range(1000):
            self.world.pause()

    def _submit(self) -> None:
        draw = self.world.random
        dp_rank = draw.randrange(len(self.leaders))
        self.num_requests += 1
        shared = draw.choice([0, 0, 4, 8])
        prompt = [*range(shared), *draw.choices(range(VOCAB_SIZE), k=draw.randint(1, 9))]
        prompt = prompt[: self.pool_tokens - 1]
        sampling = SamplingParams(
            max_tokens=draw.choice([0, 1, 2, 5, 30]),
            ignore_eos=draw.random() < 0.5,
            prompt_logprobs=draw.choice([None, None, 0]),
        )
        max_len = min(self.pool_tokens + 1, MAX_MODEL_LEN)
        expected = expected_answer(prompt, sampling, eos_ids=EOS_IDS, max_len=max_len)
        message = Generate(str(self.num_requests), prompt, sampling)
        self.live[message.request_id] = Live(expected, dp_rank)
        self.leaders[dp_rank].inbox.append(message)

    def _abort(self) -> None:
        if self.live:
            request_id = self.world.random.choice(list(self.live))
            self.leaders[self.live.pop(request_id).dp_rank].inbox.append(Abort([request_id]))

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if (live := self.live.get(output.request_id)) is None:
                continue  # aborted; its scheduler had not heard of it
            live.token_ids += output.token_ids
            assert live.token_ids == live.expected.token_ids[: len(live.token_ids)]
            if output.finish_reason is not None:
                assert output.finish_reason == live.expected.finish_reason
                assert live.token_ids == live.expected.token_ids
                del self.live[output.request_id]


@pytest.mark.parametrize(
    ("dp", "tp", "num_engines"), [(1, 1, 10), (2, 1, 25), (2, 2, 15), (4, 1, 15), (3, 2, 10)]
)
def test_every_rank_runs_the_same_steps_and_every_answer_is_right(dp, tp, num_engines):
    num_steps = num_parked = 0
    for seed in range(num_engines):
        engine = Engine(seed, dp, tp)
        num_steps += engine.run(num_actions=60)
        parked = [leader.num_parked for leader in engine.leaders]
        assert min(parked) > 1
        assert max(parked) - min(parked) <= 1, "they park together"
        num_parked += max(parked)
    assert num_steps > 40 * num_engines
    assert num_parked > 4 * num_engines
    print(f"dp={dp} tp={tp}: {num_steps} steps, parked {num_parked} times")


class _ForgetfulHub(HubLockstep):
    """Wakes nobody."""

    def agree(self, plan: Any, *, busy: bool) -> Any:
        self._parked = False
        return super().agree(plan, busy=busy)


def test_a_hub_that_wakes_nobody_is_found_out(monkeypatch):
    monkeypatch.setattr("tests.core.engine.run.test_lockstep_random.HubLockstep", _ForgetfulHub)
    with pytest.raises(Deadlock, match="leader 1 waits for work at DP rank 1"):
        Engine(0, dp=2, tp=1).run(num_actions=60)
