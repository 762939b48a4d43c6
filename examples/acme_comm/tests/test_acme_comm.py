"""The backend against Nodeweave's contract of its family, on 2 and 3 ranks, each a process."""

import pytest
from acme_comm import register_comm

from core.testing.comm import (
    CASES,
    Case,
    Ran,
    check,
    check_a_lost_rank_is_named,
    check_sums_are_rounded_once,
    run_backend,
)


@pytest.fixture(scope="module", params=[2, 3])
def ran(request: pytest.FixtureRequest) -> Ran:
    [registration] = register_comm()
    return run_backend(registration, ["cpu"] * request.param, lose_the_last=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_collective_is_plain_torch(ran: Ran, case: Case) -> None:
    check(ran, case)


def test_sums_are_rounded_once(ran: Ran) -> None:
    check_sums_are_rounded_once(ran)


def test_a_lost_rank_is_named(ran: Ran) -> None:
    check_a_lost_rank_is_named(ran)
