"""Whose turns count where DP ranks have unequal rows."""

import argparse
from typing import Any

from benchmarks import dp_rows
from benchmarks.dp_rows import FIRST_TURN, NEW_TOKENS, PROMPTS_AT
from core.interfaces.messages import Generate, RequestOutput


class Leader:
    """All ranks park some turns after the requests of a cell were sent, whoever had them."""

    def __init__(self) -> None:
        self.num_sent: list[int] = [0]  # requests, by cell
        self._turns = 0

    @property
    def is_parked(self) -> bool:
        return self._turns == 0

    def send(self, message: Generate) -> None:
        assert self._turns == 0
        assert all(10 <= token < 50 for token in message.prompt_ids)
        self.num_sent[-1] += 1

    def step(self) -> list[RequestOutput]:
        self._turns = (self._turns + 1) % (NEW_TOKENS + 1)
        if self._turns == 0:
            self.num_sent.append(0)
        return []


def measured(dp_rank: int) -> tuple[list[dict[str, Any]], list[int]]:
    leader = Leader()
    arguments = argparse.Namespace(batches="8,1", prefill=None)
    rows = list(dp_rows.measure(leader, dp_rank, 2, 50, arguments))
    return rows, leader.num_sent


def test_other_ranks_have_as_many_rows_fewer_or_none() -> None:
    rows, num_sent = measured(0)
    assert [row["rows"] for row in rows] == [[8, 8], [8, 4], [8, 1], [8, 0], [1, 1], [1, 0]]
    assert num_sent == [4, 8, 8, 8, 8, 1, 1, 0]
    assert measured(1)[1] == [4, 8, 4, 1, 0, 1, 0, 0]


def test_gaps_are_those_while_prompts_are_computed() -> None:
    times = [(9.0, 0)] * FIRST_TURN + [(1.0, 0)] * (PROMPTS_AT - FIRST_TURN)
    times += [(1.0, 0), (3.0, 2), (5.0, 0), (4.0, 2), (7.0, 0)]
    assert dp_rows.gaps(times, 4) == {
        "decode_ms": 1000.0,
        "gap_ms_p50": 3500.0,
        "gap_ms_max": 5000.0,
        "steps": 4,
        "prompts_ms": 13000.0,
    }
