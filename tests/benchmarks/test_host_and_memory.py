"""The programs that watch memory and the host's time, with a tiny model on a CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks import host_engine, host_step, soak
from tests.support.models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_moe", "qwen3_moe")


def test_a_soak_answers_and_compares_early_with_late(folder: Path) -> None:
    words = ["--steps", "60", "--layers", "3", "--batch", "4", "--uniform-routing"]
    row = soak.measure(soak.parsed([str(folder), *words, "--device", "cpu"]))
    assert row["steps"] == 60
    assert row["answered"] > 0
    assert set(row["grown"]) == set(row["early_bytes"]) == {"resident"}


@pytest.mark.parametrize(
    ("late", "bounded"),
    [
        ({"resident": 1000, "allocated": 10000, "device": 1005}, True),
        ({"resident": 1000, "allocated": 10002, "device": 1000}, False),
        ({"resident": 1011, "allocated": 10000, "device": 1000}, False),
        ({"resident": 990, "allocated": 10000, "device": 1020}, False),
    ],
)
def test_growth_is_told(late: dict[str, int], bounded: bool) -> None:
    early = {"resident": 1000, "allocated": 10000, "device": 1000}
    assert soak.compared(early, late)["bounded"] is bounded


def test_the_hosts_part_of_a_turn_is_what_it_does_not_wait(folder: Path) -> None:
    words = ["--batch", "3", "--context", "8", "--steps", "5", "--device", "cpu"]
    row = host_engine.measure(host_engine.parsed([str(folder), *words]))
    assert 0 < row["launch_ms"] <= row["turn_ms"]
    assert 0 < row["busy_ms"] <= row["turn_ms"]
    assert row["idle_us"] is None


def test_the_parts_of_a_step_without_a_model() -> None:
    row = host_step.measure(3, 5, 20, torch.device("cpu"))
    assert row["batch"] == 3
    assert row["plan_and_commit_ms"] > 0
    assert 0 < row["launch_ms"] <= row["slowest_turn_ms"]
