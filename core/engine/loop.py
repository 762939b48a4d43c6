"""The engine's loop on the scheduler's rank, and the followers' on the other ranks.

Step n+1 is planned and launched before step n's tokens are on the host. Knows nothing of sockets:
it is given an inbox, an outbox and the ranks' plan channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.engine.launch import StepLauncher, Wait
from core.engine.scheduler import Scheduler
from core.interfaces.messages import EngineInput, EngineStats, RequestOutput, StepPlan


class Inbox(Protocol):
    """Where requests come from."""

    def drain(self, *, wait: bool) -> list[EngineInput]:
        """Every message there is; with `wait`, blocks until there is one."""
        ...


class Outbox(Protocol):
    """Where outputs go."""

    def send(self, outputs: list[RequestOutput], stats: EngineStats) -> None: ...


class PlanSender(Protocol):
    """Hands each step's plan to the other ranks of the group."""

    def send(self, plan: StepPlan) -> None: ...


class NoFollowers:
    """The plan sender of a group of one rank."""

    def send(self, plan: StepPlan) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was launched and whose tokens were not read yet."""

    plan: StepPlan
    wait: Wait


class EngineLoop:
    """Scheduler, launcher and mailboxes of one replica."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        launcher: StepLauncher,
        inbox: Inbox,
        outbox: Outbox,
        followers: PlanSender,
    ) -> None:
        self.scheduler = scheduler
        self.launcher = launcher
        self.inbox = inbox
        self.outbox = outbox
        self.followers = followers

    def run(self) -> None:
        """Serve until the process ends."""
        previous: RunningStep | None = None
        while True:
            previous = self.step(previous)

    def step(self, previous: RunningStep | None) -> RunningStep | None:
        """One turn: admit, launch the next step, then hand out the previous one's tokens."""
        idle = previous is None and not self.scheduler.has_work
        if idle:
            self.outbox.send([], self.scheduler.stats())
        outputs = self.scheduler.admit(self.inbox.drain(wait=idle))
        running = self._launch()
        if previous is not None:
            outputs += self.scheduler.commit(previous.plan, previous.wait())
        self.outbox.send(outputs, self.scheduler.stats())
        return running

    def _launch(self) -> RunningStep | None:
        plan = self.scheduler.next_batch()
        if plan is None:
            return None
        self.followers.send(plan)
        return RunningStep(plan, self.launcher.launch(plan))


class PlanReceiver(Protocol):
    """Where a follower's plans come from."""

    def receive(self) -> StepPlan:
        """Blocks until the next plan."""
        ...


def follow(launcher: StepLauncher, plans: PlanReceiver) -> None:
    """Run what the scheduler's rank decides, until the process ends."""
    waits: list[Wait] = []
    while True:
        waits.append(launcher.launch(plans.receive()))
        if len(waits) > 1:  # surfaces a failed step; never more than one step behind
            waits.pop(0)()


def warm_up(launcher: StepLauncher, plans: Sequence[StepPlan]) -> None:
    """Run steps whose results nobody reads, so that the first request meets warm kernels."""
    for plan in plans:
        launcher.launch(plan)()
