"""Lockstep between threads, for engines whose leaders all turn at the same time."""

import threading

from core.engine.run.lockstep import Agreement, RankFacts, rank_facts, settle
from core.interfaces.messages import ScheduledStep

TIMEOUT_S = 60.0  # of waiting for the other leaders, one of which may have failed


class _Table:
    def __init__(self, num_dp: int) -> None:
        self.facts: list[RankFacts | None] = [None] * num_dp
        self.barrier = threading.Barrier(num_dp)


class ThreadLockstep:
    """core.engine.run.lockstep.Lockstep; nobody is woken, as everyone turns until all park."""

    def __init__(self, dp_rank: int, table: _Table) -> None:
        self._dp_rank = dp_rank
        self._table = table
        self._round = 0

    def agree(self, plan: ScheduledStep | None, *, busy: bool) -> Agreement:
        self._round += 1
        self._table.facts[self._dp_rank] = rank_facts(self._round, plan, busy=busy)
        self._table.barrier.wait(TIMEOUT_S)
        told = [facts for facts in self._table.facts if facts is not None]
        self._table.barrier.wait(TIMEOUT_S)  # before anyone writes the next facts
        return settle(told)


def thread_locksteps(num_dp: int) -> list[ThreadLockstep]:
    """One for the leader of each DP rank; each belongs to one thread at a time."""
    table = _Table(num_dp)
    return [ThreadLockstep(dp_rank, table) for dp_rank in range(num_dp)]
