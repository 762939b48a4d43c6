"""DP ranks in lockstep: before every step their schedulers agree on what it holds.

Ranks of one engine meet in collectives (experts, output head), so all of them must run the same
steps in the same order, also those whose scheduler has nothing to run. The leaders therefore hold
one *round* a turn: each says what its step holds (`RankFacts`), all get the same `Agreement`. The
leader of DP rank 0 is the *hub*: it collects and answers. Knows nothing of sockets or schedulers.

A turn of a leader: take in messages, schedule step n+1, agree, launch n+1, then wait for step n and
commit it. The round's messages travel while step n computes. A leader may also wait for step n
before it schedules n+1, where that is worth it.

- `runs`: some rank has rows. Everyone launches the step, those without rows an idle one.
- Nobody has rows, somebody is *busy*: its requests wait for a commit. Everyone goes on to the
  next round without launching.
- `parks`: nobody has rows or is busy. Everyone waits until its inbox has something or a `Wake`
  comes. Who gets work opens the next round; the hub, which that one's facts wake at the latest,
  wakes the others.

Why nothing hangs:

1. All leaders get the same agreement of round k, so all launch or none does: every rank runs the
   same steps in the same order, and step n finishes, as its collectives wait only for the other
   ranks to launch it and the steps before.
2. Suppose all leaders have got the agreement of round k. If it parks, they enter round k+1 when
   the first one gets work: its facts reach the hub, which waits for messages too, and the hub
   wakes the others before it waits for their facts. If it does not park, each enters round k+1
   after waiting at most for the step launched before round k's and for round k's own. All ranks
   launched the former before they entered round k, and launch the latter as soon as they have the
   agreement, so both finish, by 1. Either way all enter round k+1, and the hub
   sends its agreement. No step is waited for before all have launched it.
3. Nothing of a round is left for the next: a leader has one message under way, and a wake that
   crosses its facts arrives before the agreement, on the same ordered link, and is dropped there.
4. A busy leader without rows has a step in flight (the scheduler asserts that), which this turn
   commits. So a round in which nobody runs is followed by one with rows or by parking.

Who schedules a step learns what the others' hold only afterwards. What it needs to know before,
whether any of them has requests that wait for its prompts, each therefore says a round earlier
(`decodes_follow`). That is never too little: a request decodes in step n+1 only if it did in step n
and goes on, or if its prompt ended in step n, which is known when step n is scheduled. It may be
too much, as requests end meanwhile. It makes steps smaller, never empty, so that nothing above
depends on it.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from core.errors import WorkerDied
from core.interfaces.messages import ScheduledStep, StepFacts


class RankFacts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Leader -> hub: what a DP rank's next step holds."""

    round: int
    rows: int  # tokens computed
    samples: int  # rows that choose a token
    logprob_rows: int  # prompt positions whose logprobs are wanted
    has_prefill: bool
    busy: bool  # requests are live or a step is not committed: don't park
    best_only: bool = True  # its requests want the best tokens alone
    decodes_follow: bool = False  # `ScheduledStep.decodes_follow`; without a step there are none
    sequences: int = 0  # rows of the step: decodes and prompts


class Wake(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hub -> leader: a round was opened while everyone was parked."""

    round: int


class Agreement(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hub -> leader: the end of a round, the same for all."""

    round: int
    facts: StepFacts
    parks: bool  # nobody has rows or expects any: wait for work
    decodes_follow: list[bool]  # by DP rank: whether it may have decodes in the next step

    @property
    def runs(self) -> bool:
        """Whether the step is launched."""
        return any(self.facts.rows)


HubMessage = Wake | Agreement


class Lockstep(Protocol):
    """One DP rank's side of the agreement. Nobody has work before the first round."""

    def agree(self, scheduled: ScheduledStep | None, *, busy: bool) -> Agreement:
        """Hold a round; blocks until every DP rank has called this as often.

        Raises WorkerDied naming those who did not within the time a step may take.
        """
        ...


class HubLinks(Protocol):
    """The hub's links to the other leaders."""

    def send(self, dp_rank: int, message: HubMessage) -> None: ...

    def receive(self) -> tuple[int, RankFacts]:
        """The next message and the DP rank it is from. Raises TimeoutError."""
        ...


class HubLink(Protocol):
    """Another leader's link to the hub. Order is kept."""

    def send(self, facts: RankFacts) -> None: ...

    def receive(self) -> HubMessage:
        """Raises TimeoutError."""
        ...


class SoloLockstep:
    """The only DP rank: agrees with itself."""

    def __init__(self) -> None:
        self._round = 0

    def agree(self, scheduled: ScheduledStep | None, *, busy: bool) -> Agreement:
        self._round += 1
        return settle([rank_facts(self._round, scheduled, busy=busy)])


class HubLockstep:
    """DP rank 0 of several."""

    def __init__(self, links: HubLinks, leaders: Sequence[int]) -> None:
        """`leaders`: the ranks that schedule, by DP rank."""
        self._links = links
        self._leaders = leaders
        self._others = range(1, len(leaders))
        self._round = 0
        self._parked = True

    def agree(self, scheduled: ScheduledStep | None, *, busy: bool) -> Agreement:
        self._round += 1
        if self._parked:
            for dp_rank in self._others:
                self._links.send(dp_rank, Wake(self._round))
        told = {0: rank_facts(self._round, scheduled, busy=busy)}
        while len(told) <= len(self._others):
            try:
                dp_rank, facts = self._links.receive()
            except TimeoutError as error:
                silent = [other for other in self._others if other not in told]
                raise WorkerDied(
                    f"the scheduler of DP rank {', '.join(map(str, silent))} does not answer: "
                    f"{error}",
                    ranks=[self._leaders[other] for other in silent],
                ) from error
            assert facts.round == self._round, (dp_rank, facts, self._round)
            assert dp_rank not in told, (dp_rank, facts)
            told[dp_rank] = facts
        agreement = settle([told[dp_rank] for dp_rank in sorted(told)])
        for dp_rank in self._others:
            self._links.send(dp_rank, agreement)
        self._parked = agreement.parks
        return agreement


class PeerLockstep:
    """Every other DP rank."""

    def __init__(self, link: HubLink, hub_rank: int) -> None:
        """`hub_rank`: the rank that schedules for DP rank 0."""
        self._link = link
        self._hub_rank = hub_rank
        self._round = 0

    def agree(self, scheduled: ScheduledStep | None, *, busy: bool) -> Agreement:
        self._round += 1
        self._link.send(rank_facts(self._round, scheduled, busy=busy))
        while True:
            try:
                message = self._link.receive()
            except TimeoutError as error:
                raise WorkerDied(
                    f"the schedulers don't agree on a step: DP rank 0 does not answer: {error}",
                    ranks=[self._hub_rank],
                ) from error
            assert message.round == self._round, (message, self._round)
            if isinstance(message, Agreement):
                return message


def rank_facts(round_number: int, scheduled: ScheduledStep | None, *, busy: bool) -> RankFacts:
    """What one DP rank says in a round; None: it has no rows."""
    if scheduled is None:
        return RankFacts(round_number, 0, 0, 0, False, busy)
    return RankFacts(
        round=round_number,
        rows=sum(scheduled.lengths),
        samples=sum(scheduled.samples),
        logprob_rows=scheduled.num_logprob_rows,
        has_prefill=scheduled.num_decodes < len(scheduled.slots),
        busy=busy,
        best_only=scheduled.best_only,
        decodes_follow=scheduled.decodes_follow,
        sequences=len(scheduled.slots),
    )


def settle(told: list[RankFacts]) -> Agreement:
    """What follows from everybody's facts, in the order of DP ranks."""
    rows = [facts.rows for facts in told]
    return Agreement(
        round=told[0].round,
        facts=StepFacts(
            rows=rows,
            samples=[facts.samples for facts in told],
            logprob_rows=[facts.logprob_rows for facts in told],
            has_prefill=any(facts.has_prefill for facts in told),
            best_only=all(facts.best_only for facts in told),
            most_sequences=max(facts.sequences for facts in told),
        ),
        parks=not any(rows) and not any(facts.busy for facts in told),
        decodes_follow=[facts.decodes_follow for facts in told],
    )
