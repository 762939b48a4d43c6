"""All links of one rank to the others and to the frontend, by its place in the plan.

The leader of a DP rank (the first rank of its attention group) talks to the frontend, to its
followers and to the other leaders; a follower hears its leader. Knows which sockets there are and
who uses them, nothing of what is said.

    links = open_links(Wire(endpoints.key), endpoints, plan, rank, step_timeout_s=60)
    ...                         # the long work: weights
    links.await_peers(600)
    links.serve(scheduler, executor, expert_balancer)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import zmq

from core.engine.run.executor import StepExecutor
from core.engine.run.expert_balance import ExpertBalancer
from core.engine.run.lockstep import HubLockstep, Lockstep, PeerLockstep, SoloLockstep
from core.engine.run.loop import EngineLoop, NoFollowers, StepSender, follow
from core.engine.run.mailbox import (
    ZmqHubLink,
    ZmqHubLinks,
    ZmqMailbox,
    ZmqStepReceiver,
    ZmqStepSender,
)
from core.engine.schedule.scheduler import Scheduler
from core.interfaces.control import Endpoints
from core.parallel.plan import Plan
from core.wire import Socket, Wire


class RankLinks(Protocol):
    """The links of one rank, whichever it is. For one thread."""

    def await_peers(self, timeout_s: float) -> None:
        """Until those this rank talks to are there, each within `timeout_s`; before `serve`.
        Raises ResourceError naming those who are not."""
        ...

    def serve(
        self, scheduler: Scheduler, executor: StepExecutor, expert_balancer: ExpertBalancer
    ) -> NoReturn:
        """Run the engine's loop, or follow the one who does, until the process ends."""
        ...


class _Awaited(Protocol):
    def await_peers(self, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderLinks:
    """Of a rank that schedules."""

    mailbox: ZmqMailbox
    followers: StepSender
    lockstep: Lockstep
    wait_for_work: Callable[[], None]
    awaited: tuple[_Awaited, ...]

    def await_peers(self, timeout_s: float) -> None:
        for link in self.awaited:
            link.await_peers(timeout_s)

    def serve(
        self, scheduler: Scheduler, executor: StepExecutor, expert_balancer: ExpertBalancer
    ) -> NoReturn:
        EngineLoop(
            scheduler=scheduler,
            executor=executor,
            inbox=self.mailbox,
            outbox=self.mailbox,
            followers=self.followers,
            lockstep=self.lockstep,
            wait_for_work=self.wait_for_work,
            report=lambda: self.mailbox.send_expert_loads(expert_balancer.take_loads()),
        ).run()


@dataclass(frozen=True, slots=True)
class FollowerLinks:
    """Of a rank that runs what its leader decides."""

    steps: ZmqStepReceiver

    def await_peers(self, timeout_s: float) -> None:
        self.steps.await_peers(timeout_s)

    def serve(
        self, scheduler: Scheduler, executor: StepExecutor, expert_balancer: ExpertBalancer
    ) -> NoReturn:
        follow(executor, self.steps)


def open_links(
    wire: Wire, endpoints: Endpoints, plan: Plan, rank: int, *, step_timeout_s: float
) -> RankLinks:
    """Bind and connect the sockets of a rank. Raises ResourceError where an address is taken.

    A scheduler that waits longer than `step_timeout_s` for the others' facts gives up.
    """
    dp_rank, num_dp = plan.axis_index("dp", rank), plan.axis_size("dp")
    leader, *others = plan.group("tp", rank)
    if rank != leader:
        return FollowerLinks(ZmqStepReceiver(wire, endpoints.steps[dp_rank], rank))
    awaited: list[_Awaited] = []
    followers: StepSender = NoFollowers()
    if others:
        followers = sender = ZmqStepSender(wire, endpoints.steps[dp_rank], others)
        awaited.append(sender)
    mailbox = ZmqMailbox(wire, endpoints.engine, dp_rank)
    sockets = [mailbox.socket]
    lockstep: Lockstep = SoloLockstep()
    leaders = [group[0] for group in plan.groups("tp")][:num_dp]
    if num_dp > 1 and dp_rank == 0:
        hub = ZmqHubLinks(wire, endpoints.lockstep, leaders, answer_s=step_timeout_s)
        lockstep = HubLockstep(hub, leaders)
        sockets.append(hub.socket)
        awaited.append(hub)
    elif num_dp > 1:
        link = ZmqHubLink(wire, endpoints.lockstep, dp_rank, answer_s=step_timeout_s)
        lockstep = PeerLockstep(link, leaders[0])
        sockets.append(link.socket)
        awaited.append(link)
    return LeaderLinks(
        mailbox=mailbox,
        followers=followers,
        lockstep=lockstep,
        wait_for_work=_wait_for_any(sockets),
        awaited=tuple(awaited),
    )


def _wait_for_any(sockets: list[Socket]) -> Callable[[], None]:
    """A function that blocks until one of the sockets has a message, and leaves it there."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)

    def wait() -> None:
        poller.poll()

    return wait
