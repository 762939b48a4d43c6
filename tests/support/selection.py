"""Which cases `make test` leaves to `make test-all`: see the markers in pyproject.toml.

Knows nothing of what tests check.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.pairwise import covering

TOGETHER = {"each_choice": 1, "pairwise": 2}  # how many values of a case must still meet, by mark


def leave_out_cases(items: list[pytest.Item]) -> None:
    """Of the cases of each test that bear such a mark, those become `slow` whose values, or pairs
    of values, others have too."""
    cases: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for item in items:
        for mark in TOGETHER:
            if item.get_closest_marker(mark):
                cases[item.nodeid.partition("[")[0], mark].append(item)
    for (_, mark), of_test in cases.items():
        kept = covering([_values(item) for item in of_test], TOGETHER[mark])
        for index, item in enumerate(of_test):
            if index not in kept:
                item.add_marker("slow")


def _values(item: Any) -> tuple[tuple[int, ...], ...]:
    """Which value of each `parametrize` a case has: all cases of a test share the objects.
    (pytest's `callspec.indices` count cases, not values.)"""
    params = item.callspec.params
    together = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    alone = sorted(params.keys() - {name for names in together for name in names})  # of fixtures
    columns = [*together, *([name] for name in alone)]
    return tuple(tuple(id(params[name]) for name in names) for names in columns)


def _names(given: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
