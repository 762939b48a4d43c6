"""When the loop plans a step, and what it has the foresight learn. Neither devices nor clocks."""

from collections.abc import Callable

from core.config import EngineConfig
from core.engine.lockstep import SoloLockstep
from core.engine.loop import BLIND, EngineLoop, NoFollowers, RunningStep
from core.engine.pace import Pace
from core.engine.scheduler import Scheduler
from core.interfaces.messages import (
    AgreedStep,
    EngineInput,
    EngineStats,
    Generate,
    RequestOutput,
    SamplingParams,
    StepPlan,
    StepResult,
)
from tests.support.fake_runner import FakeRunner

PAGE_SIZE, NUM_PAGES = 16, 400


class Mailbox:
    """Implements Inbox and Outbox."""

    def __init__(self) -> None:
        self.messages: list[EngineInput] = []

    def drain(self) -> list[EngineInput]:
        messages, self.messages = self.messages, []
        return messages

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        pass


class Launcher:
    """Stands for core.engine.launch.StepLauncher; notes the prompt tokens of each step."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.prompt_tokens: list[int] = []
        self._runner = FakeRunner(PAGE_SIZE, NUM_PAGES)

    def launch(self, step: AgreedStep) -> Callable[[], StepResult]:
        plan = step.plan
        self.prompt_tokens.append(sum(plan.lengths[plan.num_decodes :]))
        result = self._runner.run_agreed(step, 0)
        return lambda: result


class Foresight:
    """Foresees a second, and has a message come while it waits."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.coming: list[EngineInput] = []
        self.observed: list[StepPlan] = []
        self.waited = 0
        self._mailbox = mailbox

    def expected_s(self, plan: StepPlan) -> float:
        return 1.0

    def observe(self, plan: StepPlan, seconds: float, waited_s: float) -> None:
        assert 0 <= waited_s <= seconds
        self.observed.append(plan)

    def wait(self, begun_s: float, expected_s: float) -> None:
        assert begun_s > 0
        self.waited += 1
        self._mailbox.messages += self.coming
        self.coming = []


def ask(name: str, tokens: int) -> Generate:
    return Generate(name, [5] * tokens, SamplingParams(max_tokens=50, ignore_eos=True))


def make(mixed_tokens: int | None = None) -> tuple[EngineLoop, Mailbox, Launcher, Foresight]:
    mailbox, launcher = Mailbox(), Launcher()
    foresight = Foresight(mailbox)
    loop = EngineLoop(
        scheduler=Scheduler(
            EngineConfig(page_size=PAGE_SIZE, disable_prefix_cache=True),
            num_pages=NUM_PAGES,
            max_model_len=1024,
            eos_ids=[],
            mixed_tokens=mixed_tokens,
        ),
        launcher=launcher,  # type: ignore[arg-type]
        inbox=mailbox,
        outbox=mailbox,
        followers=NoFollowers(),
        lockstep=SoloLockstep(),
        wait_for_work=lambda: None,
        foresight=foresight,
    )
    return loop, mailbox, launcher, foresight


def turn(loop: EngineLoop, running: RunningStep | None, times: int) -> RunningStep | None:
    for _ in range(times):
        running = loop.step(running)
    return running


def test_who_comes_while_a_step_runs_is_in_the_next_one() -> None:
    loop, mailbox, launcher, foresight = make()
    mailbox.messages.append(ask("first", 30))
    running = turn(loop, None, 2)
    foresight.coming = [ask("second", 20)]
    turn(loop, running, 1)
    assert launcher.prompt_tokens == [30, 0, 20]


def test_without_foresight_it_is_in_the_one_after_that() -> None:
    loop, mailbox, launcher, foresight = make()
    loop.foresight = BLIND
    mailbox.messages.append(ask("first", 30))
    running = turn(loop, None, 3)  # while the second step runs, the third one is planned already
    mailbox.messages.append(ask("second", 20))
    turn(loop, running, 1)
    assert launcher.prompt_tokens == [30, 0, 0, 20]
    assert foresight.waited == 0


def test_nothing_is_waited_for_where_prompts_fill_the_next_step_anyway() -> None:
    loop, mailbox, launcher, foresight = make(mixed_tokens=16)
    mailbox.messages.append(ask("decodes", 8))
    running = turn(loop, None, 2)
    waited = foresight.waited
    mailbox.messages += [ask(f"{number}", 200) for number in range(5)]
    running = turn(loop, running, 1)  # they are taken in after this turn's wait
    assert foresight.waited == waited + 1
    running = turn(loop, running, 1)
    assert foresight.waited == waited + 1
    while sum(launcher.prompt_tokens) < 8 + 5 * 200:
        running = turn(loop, running, 1)
    turn(loop, running, 1)
    assert foresight.waited > waited + 1


def test_every_step_is_observed_in_order() -> None:
    loop, mailbox, _, foresight = make()
    mailbox.messages.append(ask("first", 30))
    turn(loop, None, 6)
    assert [plan.step for plan in foresight.observed] == [1, 2, 3, 4, 5]
