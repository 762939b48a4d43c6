"""What `make test` takes of the tests, and how it shares them out."""

import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.pairwise import covering
from tests.support.selection import leave_out_cases
from tests.support.workers import FIRST, TIMED, FilesInOrder, place

ROOT = Path(__file__).parents[2]


def pairs_of(rows: list[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5, 4, 2), (1, 1, 7, 3, 2)], ids=str)
def test_every_pair_of_a_product_stays_and_few_rows(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[index] for index in covering(rows)]
    assert pairs_of(chosen) == pairs_of(rows)
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(chosen) <= 1.5 * first * second


def test_pairs_that_no_row_has_are_not_asked_for() -> None:
    source = random.Random(1)
    rows = [tuple(source.randrange(4) for _ in range(4)) for _ in range(60)]
    chosen = [rows[index] for index in covering(rows)]
    assert pairs_of(chosen) == pairs_of(rows)
    assert len(chosen) < 40


def test_each_value_stays_and_values_come_about_as_often() -> None:
    rows = list(itertools.product(range(19), range(2)))
    chosen = [rows[index] for index in covering(rows, together=1)]
    assert sorted(case for case, _ in chosen) == list(range(19))
    assert sum(dtype for _, dtype in chosen) in (9, 10)


def test_one_parameter_is_kept_whole_and_nothing_is_nothing() -> None:
    assert covering([(0,), (1,), (2,)]) == {0, 1, 2}
    assert covering([]) == set()


class Item:
    """A case as pytest collects it."""

    def __init__(self, test: str, marks: set[str], **params: int) -> None:
        self.nodeid = f"{test}[{'-'.join(map(str, params.values()))}]"
        self.callspec = SimpleNamespace(params=params)
        self.marks = marks

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def iter_markers(self, name: str) -> list[Any]:
        return [SimpleNamespace(args=[param]) for param in self.callspec.params]

    def add_marker(self, name: str) -> None:
        self.marks.add(name)


def test_only_marked_cases_are_left_out_and_of_each_test_by_itself() -> None:
    values = list(itertools.product(range(3), range(3), range(3)))
    interpreted = [Item("a", {"pairwise"}, ops=0, x=x, y=y, z=z) for x, y, z in values]
    compiled = [Item("a", set(), ops=1, x=x, y=y, z=z) for x, y, z in values]
    other = [Item("b", {"pairwise"}, x=x, y=y) for x, y in {(x, y) for x, y, _ in values}]
    few = [Item("c", {"each_choice"}, x=x, y=y) for x, y in itertools.product(range(3), range(3))]
    items: Any = [*interpreted, *compiled, *other, *few]
    leave_out_cases(items)
    assert not any("slow" in item.marks for item in [*compiled, *other])
    assert sum("slow" not in item.marks for item in few) == 3
    kept = [item for item in interpreted if "slow" not in item.marks]
    assert 9 <= len(kept) <= 14
    rows = [tuple(item.callspec.params.values()) for item in kept]
    assert pairs_of(rows) == pairs_of([(0, *row) for row in values])


COLLECTED = """
import pytest

@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(1, 2), (1, 3), [4]], ids=str)
@pytest.mark.parametrize(("dtype", "bits"), [("a", 1), ("b", 1), ("b", 2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_few(shape, dtype, bits, biased, device):
    pass

def test_other():
    pass
"""


def test_pytest_collects_few_cases(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(COLLECTED)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "from tests.support.selection import leave_out_cases\n\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items):\n"
        "    leave_out_cases(items)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_few.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def num_passed(*words: str) -> int:
        ran = subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return int(ran.stdout.rpartition(" passed")[0].rpartition("\n")[2])

    assert num_passed() == 37
    assert 10 <= num_passed("-m", "not slow") <= 13


def test_files_that_tell_seconds_are_one_workers_and_exist() -> None:
    assert all((ROOT / path).is_file() for path in TIMED)
    assert all((ROOT / folder).is_dir() for folder in FIRST)
    scope = FilesInOrder._split_scope
    scheduling: Any = object.__new__(FilesInOrder)
    assert {scope(scheduling, f"{path}::test") for path in TIMED} == {"timed"}
    assert scope(scheduling, "tests/core/test_plan.py::a[b]") == "tests/core/test_plan.py"
    assert issubclass(FilesInOrder, LoadFileScheduling)


def test_what_takes_long_begins_first() -> None:
    paths = ["tests/core/test_plan.py", "tests/contracts/test_ops.py", *TIMED]
    paths += [f"{FIRST[0]}test_clients.py"]
    ordered = sorted(paths, key=place)
    assert ordered[: len(TIMED)] == list(TIMED)
    assert ordered[-1] == "tests/core/test_plan.py"
