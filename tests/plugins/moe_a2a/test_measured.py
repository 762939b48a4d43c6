"""moe_a2a=auto by what was measured."""

from typing import Any

import pytest

from core.settings.config import AppConfig, EngineConfig, LaunchConfig, ModelConfig, ParallelConfig
from plugins import moe_a2a
from plugins.moe_a2a._measured import fastest, measured_rows

NAMES = {"allgather", "nccl", "symm_mem"}


def row(rows: int, us: dict[str, float], **changes: Any) -> dict[str, Any]:
    plain = {"device": "H200", "one_host": True, "ranks": 2, "hidden": 7168, "fp8": True}
    return plain | {"rows": rows, "us": us} | changes


TABLE = [
    row(1, {"allgather": 30.0, "nccl": 40.0, "symm_mem": 10.0}),
    row(64, {"allgather": 40.0, "nccl": 50.0, "symm_mem": 20.0}),
    row(4096, {"allgather": 500.0, "nccl": 400.0, "symm_mem": 8000.0}),
    row(64, {"allgather": 10.0, "symm_mem": 20.0}, hidden=2048),
    row(64, {"allgather": 90.0, "nccl": 70.0}, one_host=False, ranks=16),
]


def pick(**changes: Any) -> str | None:
    facts: dict[str, Any] = {
        "ranks": 2,
        "one_host": True,
        "least_rows": 0,
        "most_rows": 64,
        "hidden_size": 7168,
        "names": NAMES,
    }
    return fastest(TABLE, **facts | changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "symm_mem"),
        ({"most_rows": 1}, "symm_mem"),
        ({"most_rows": 8192}, "allgather"),  # never the slowest
        ({"most_rows": 8192, "least_rows": 500}, "nccl"),
        ({"most_rows": 60, "least_rows": 30}, "symm_mem"),
        ({"names": {"allgather", "nccl"}}, "allgather"),
        ({"names": {"nccl"}}, None),
        ({"hidden_size": 2048}, "allgather"),
        ({"hidden_size": 3000}, "allgather"),
        ({"hidden_size": 6000}, "symm_mem"),
        ({"ranks": 4}, None),
        ({"ranks": 16}, None),
        ({"ranks": 16, "one_host": False, "hidden_size": None}, "nccl"),
    ],
)
def test_the_fastest_of_all_sizes_is_taken(changes: dict[str, Any], name: str | None) -> None:
    assert pick(**changes) == name


def test_auto_asks_for_the_rows_of_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_a2a, "measured_rows", lambda: tuple(TABLE))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    def auto(phase: str, device: str = "cuda", nnodes: int = 1, ep: int = 2) -> str | None:
        config = AppConfig(
            model=ModelConfig(name="m", shape={"hidden_size": 7168}),
            parallel=ParallelConfig(tp=ep, ep=ep, dp_attention=ep),
            engine=EngineConfig(device=device, max_running_requests=64, max_prefill_tokens=8192),
            launch=LaunchConfig(nnodes=nnodes),
        )
        return moe_a2a.default_backend(f"moe_a2a.{phase}", device, config)

    assert auto("decode") == "symm_mem"
    assert auto("prefill") == "nccl"
    assert auto("decode", device="cpu") == "nccl"
    assert auto("decode", ep=4) == "allgather", "the rule, where nothing was measured"
    assert auto("decode", ep=16, nnodes=2) == "nccl"


def test_the_table_is_well_formed() -> None:
    if not measured_rows():
        pytest.skip("nothing was measured yet: benchmarks.gpu_a2a --write")
    for found in measured_rows():
        assert set(found) == {"device", "one_host", "ranks", "hidden", "fp8", "rows", "us"}
        assert all(us > 0 for us in found["us"].values())
