"""The engine's loop in the leader of each DP rank, and the followers' on the other ranks.

Step n+1 is planned and launched before step n's tokens are on the host, unless either is so long
that who comes meanwhile had better be in step n+1. With several DP ranks every turn is agreed on by
all (`core.engine.run.lockstep`), and a rank without rows runs the step all the same. Knows nothing
of sockets: it is given an inbox, an outbox and the ranks' channels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from core.engine.run.executor import StepExecutor, Wait
from core.engine.run.lockstep import Lockstep, rank_facts, settle
from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import (
    AgreedStep,
    EngineInput,
    EngineStats,
    RequestOutput,
    ScheduledStep,
)

# Where prompts that take longer are computed or wait, a step is awaited before the next one is
# planned: the device then idles for the millisecond that planning takes, and a request that comes
# meanwhile waits for the rest of one step, not for another one that was planned without it.
LONG_STEP_S = 0.1
# The step of a DP rank without rows in a step; schedulers number theirs from 1.
IDLE_STEP = ScheduledStep(0, [], 0, [], [], [], [], [], [], [], best_only=True)


class Inbox(Protocol):
    """Where requests come from."""

    def drain(self) -> list[EngineInput]:
        """Every message there is; does not wait."""
        ...


class Outbox(Protocol):
    """Where outputs go."""

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None: ...


class StepSender(Protocol):
    """Hands each step to the other ranks of the leader's group."""

    def send(self, step: AgreedStep) -> None: ...


class NoFollowers:
    """The step sender of a group of one rank."""

    def send(self, step: AgreedStep) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was launched and whose tokens were not read yet."""

    scheduled: ScheduledStep | None  # None: this DP rank has no rows in it
    wait: Wait
    expected_s: float = 0.0  # 0: not known
    begun_s: float | None = None  # when it was launched; None: others had to end before


class EngineLoop:
    """Scheduler, executor and mailboxes of one DP rank.

    `wait_for_work` blocks until the inbox or the lockstep has something; it is called while parked.
    `report` is called once a turn, to send what has nothing to do with requests.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: StepExecutor,
        inbox: Inbox,
        outbox: Outbox,
        followers: StepSender,
        lockstep: Lockstep,
        wait_for_work: Callable[[], None],
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.inbox = inbox
        self.outbox = outbox
        self.followers = followers
        self.lockstep = lockstep
        self.wait_for_work = wait_for_work
        self.report = report
        self.parked = True  # all DP ranks are, or none
        self._decodes_follow: list[bool] = []  # by DP rank, of the last round

    def run(self) -> NoReturn:
        """Serve until the process ends."""
        previous: RunningStep | None = None
        while True:
            previous = self.step(previous)

    def step(self, previous: RunningStep | None) -> RunningStep | None:
        """One turn: admit, launch the next step, then hand out the previous one's tokens."""
        if self.parked:
            assert previous is None, "parked with a step in flight"
            self.outbox.send([], self.scheduler.stats())
            self.wait_for_work()
        outputs: list[RequestOutput] = []
        if previous is not None and (
            previous.expected_s >= LONG_STEP_S or self.scheduler.has_prompts_for(LONG_STEP_S)
        ):
            outputs, previous = self._finish(previous), None
        outputs += self.scheduler.admit(self.inbox.drain())
        running = self._launch(alone=previous is None)
        if previous is not None:
            outputs += self._finish(previous)
        self.outbox.send(outputs, self.scheduler.stats())
        self.report()
        return running

    def _finish(self, running: RunningStep) -> list[RequestOutput]:
        """Wait for a step; what it adds to each request."""
        result = running.wait()
        if running.begun_s is not None and running.expected_s >= LONG_STEP_S:
            self.scheduler.observe(running.expected_s, time.monotonic() - running.begun_s)
        if running.scheduled is None:
            return []
        return self.scheduler.commit(running.scheduled, result)

    def _launch(self, *, alone: bool) -> RunningStep | None:
        scheduled = self.scheduler.next_batch(self._decodes_follow)
        agreement = self.lockstep.agree(scheduled, busy=self.scheduler.has_work)
        self.parked, self._decodes_follow = agreement.parks, agreement.decodes_follow
        if not agreement.runs:
            return None
        step = AgreedStep(IDLE_STEP if scheduled is None else scheduled, agreement.facts)
        self.followers.send(step)
        has_prefill = step.facts.has_prefill
        expected_s = self.executor.pace.step_s(step.scheduled, step.facts) if has_prefill else 0.0
        begun_s = time.monotonic() if alone else None
        return RunningStep(scheduled, self.executor.launch(step), expected_s, begun_s)


class StepReceiver(Protocol):
    """Where a follower's steps come from."""

    def receive(self) -> AgreedStep:
        """Blocks until the next one."""
        ...


def follow(executor: StepExecutor, steps: StepReceiver) -> NoReturn:
    """Run what the group's leader decides, until the process ends."""
    waits: list[Wait] = []
    while True:
        waits.append(executor.launch(steps.receive()))
        if len(waits) > 1:  # surfaces a failed step; never more than one step behind
            waits.pop(0)()


def warm_up(executor: StepExecutor, steps: Sequence[ScheduledStep], num_dp: int = 1) -> None:
    """Run steps whose results nobody reads, so that the first request meets warm kernels.

    Every rank calls this with the same steps, which all DP ranks then run at once.
    """
    for scheduled in steps:
        everyone = settle([rank_facts(0, scheduled, busy=True)] * num_dp)
        executor.launch(AgreedStep(scheduled, everyone.facts))()
