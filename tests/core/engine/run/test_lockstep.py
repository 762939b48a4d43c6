"""What DP ranks tell each other in a round, and what follows; the rest is test_lockstep_random."""

from collections import deque

import msgspec
import pytest

from core.engine.run.lockstep import (
    Agreement,
    HubLockstep,
    PeerLockstep,
    RankFacts,
    SoloLockstep,
    Wake,
    rank_facts,
    settle,
)
from core.engine.run.loop import IDLE_STEP, warm_up
from core.errors import WorkerDied
from core.interfaces.messages import AgreedStep, ScheduledStep, StepFacts

# Two decodes and a chunk of five prompt tokens, four of which want logprobs.
PLAN = ScheduledStep(7, [], 2, [0, 1, 2], [9, 8, 0], [1, 1, 5], [True, True, False], [], [], [], 4)
DECODES = ScheduledStep(8, [], 2, [0, 1], [9, 8], [1, 1], [True, True], [], [], [])
NOTHING = RankFacts(3, 0, 0, 0, False, False)


def test_facts_of_a_plan():
    assert rank_facts(3, PLAN, busy=True) == RankFacts(
        3, 7, 2, 4, True, True, best_only=False, sequences=3
    )
    assert rank_facts(3, DECODES, busy=True) == RankFacts(
        3, 2, 2, 0, False, True, best_only=False, sequences=2
    )
    assert rank_facts(3, None, busy=False) == NOTHING
    assert rank_facts(3, IDLE_STEP, busy=False) == NOTHING


def test_what_follows_from_everybodys_facts():
    told = [rank_facts(3, PLAN, busy=True), NOTHING, rank_facts(3, DECODES, busy=True)]
    agreement = settle(told)
    facts = StepFacts([7, 0, 2], [2, 0, 2], [4, 0, 0], True, most_sequences=3)
    assert agreement == Agreement(3, facts, parks=False, decodes_follow=[False] * 3)
    assert agreement.runs
    assert not settle([rank_facts(3, DECODES, busy=True)]).facts.has_prefill


@pytest.mark.parametrize(("busy", "parks"), [(False, True), (True, False)])
def test_without_rows_all_park_unless_somebody_waits_for_a_commit(busy, parks):
    agreement = settle([NOTHING, rank_facts(3, None, busy=busy)])
    assert (agreement.runs, agreement.parks) == (False, parks)


def test_one_dp_rank_agrees_with_itself():
    lockstep = SoloLockstep()
    first, second = lockstep.agree(PLAN, busy=True), lockstep.agree(None, busy=False)
    assert (first.round, first.facts.rows, first.parks) == (1, [7], False)
    assert (second.round, second.facts.rows, second.parks) == (2, [0], True)


class Links:
    """Both kinds of link: messages to come are given, those sent are kept."""

    def __init__(self, *to_come):
        self.to_come = deque(to_come)
        self.sent = []

    def send(self, *message):
        self.sent.append(message)

    def receive(self):
        if not self.to_come:
            raise TimeoutError("5 s passed")
        return self.to_come.popleft()


def facts(round_number, rows=0, busy=False):
    return RankFacts(round_number, rows, rows, 0, False, busy)


def test_the_hub_wakes_the_parked_and_answers_all_in_order_of_ranks():
    links = Links(
        *[(2, facts(1, rows=5)), (1, facts(1))],
        *[(1, facts(2)), (2, facts(2))],
        *[(1, facts(3)), (2, facts(3))],
    )
    hub = HubLockstep(links, range(3))
    agreements = [hub.agree(None, busy=False) for _ in range(3)]
    assert [agreement.facts.rows for agreement in agreements] == [[0, 0, 5], [0, 0, 0], [0, 0, 0]]
    assert [agreement.parks for agreement in agreements] == [False, True, True]
    told = [[message for to, message in links.sent if to == dp_rank] for dp_rank in (1, 2)]
    first, second, third = agreements
    assert told == [[Wake(1), first, second, Wake(3), third]] * 2


def test_a_peer_passes_over_a_wake_that_crossed_its_facts():
    agreement = settle([facts(1), facts(1, rows=5)])
    link = Links(Wake(1), agreement)
    assert PeerLockstep(link, 0).agree(None, busy=False) == agreement
    assert link.sent == [(facts(1),)]


def test_who_does_not_answer_is_named():
    with pytest.raises(WorkerDied, match=r"of DP rank 1, 3 does not answer: 5 s passed"):
        HubLockstep(Links((2, facts(1))), range(4)).agree(None, busy=False)
    with pytest.raises(WorkerDied, match=r"DP rank 0 does not answer: 5 s passed"):
        PeerLockstep(Links(), 0).agree(None, busy=False)


def test_ranks_that_hold_other_rounds_are_found_out():
    with pytest.raises(AssertionError):
        HubLockstep(Links((1, facts(2))), range(2)).agree(None, busy=False)
    with pytest.raises(AssertionError):
        HubLockstep(Links((1, facts(1)), (1, facts(1))), range(3)).agree(None, busy=False)
    with pytest.raises(AssertionError):
        PeerLockstep(Links(settle([facts(2)])), 0).agree(None, busy=False)


def test_all_dp_ranks_warm_up_with_rows():
    launched = []

    class DeviceExecutor:
        def launch(self, step):
            launched.append(step)
            return lambda: None

    warm_up(DeviceExecutor(), [PLAN, DECODES], num_dp=3)
    assert launched == [
        AgreedStep(PLAN, StepFacts([7] * 3, [2] * 3, [4] * 3, True, most_sequences=3)),
        AgreedStep(DECODES, StepFacts([2] * 3, [2] * 3, [0] * 3, False, most_sequences=2)),
    ]


def test_the_best_tokens_do_only_where_every_dp_rank_says_so() -> None:
    best = msgspec.structs.replace(DECODES, best_only=True)
    told = [rank_facts(3, best, busy=True), NOTHING]
    assert settle(told).facts.best_only
    assert not settle([*told, rank_facts(3, DECODES, busy=True)]).facts.best_only


def test_all_hear_who_decodes_in_the_step_after() -> None:
    goes_on = msgspec.structs.replace(DECODES, decodes_follow=True)
    told = [rank_facts(3, plan, busy=True) for plan in (goes_on, PLAN, None)]
    assert settle(told).decodes_follow == [True, False, False]
