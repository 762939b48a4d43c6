"""Which device's rows a shape takes."""

import json

import pytest
import torch

from core.devices.cuda.experts.triton_expert_tiles import choose_tiles
from core.gpu_tools import tuning
from core.gpu_tools.tuning import TunedDevice, choices, choose, tables_for

H100 = TunedDevice("NVIDIA H100 80GB HBM3", (9, 0), 132)
H100_PCIE = TunedDevice("NVIDIA H100 PCIe", (9, 0), 114)
H200 = TunedDevice("NVIDIA H200", (9, 0), 132)
GH200 = TunedDevice("NVIDIA GH200 480GB", (9, 0), 132)
A100 = TunedDevice("NVIDIA A100-SXM4-80GB", (8, 0), 108)


@pytest.mark.parametrize(
    ("device", "first"), [(H100, "H100"), (H100_PCIE, "H100"), (H200, "H200"), (GH200, "H200")]
)
def test_a_device_prefers_its_own_rows(device: TunedDevice, first: str) -> None:
    tables = tables_for(device)
    assert tables[0] == first
    assert sorted(tables) == ["H100", "H200"]


def test_rows_of_another_compute_capability_are_never_taken() -> None:
    assert tables_for(A100) == ()
    assert choices("linear_bf16", torch.device("cpu"), outputs=4096, inputs=4096) == ()


@pytest.fixture
def two_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape 1 measured on both devices, shape 2 on one."""
    rows = {
        "H100": (
            {"size": 1, "max_rows": 4, "from": "H100"},
            {"size": 2, "max_rows": 8, "from": 2},
            {"size": 4, "max_rows": 2, "from": "H100"},
            {"size": 4, "max_rows": 8, "from": "H100"},
        ),
        "H200": (
            {"size": 1, "max_rows": 4, "from": "H200"},
            {"size": 4, "max_rows": 4, "from": "H200"},
        ),
    }
    monkeypatch.setattr(tuning, "rows_of", lambda operation, table: rows[table])
    monkeypatch.setattr(tuning, "describe", lambda device: H200)


def test_each_shape_is_borrowed_by_itself(two_tables: None) -> None:
    device = torch.device("cpu")
    assert [row["from"] for row in choices("any", device, size=1)] == ["H200"]
    assert [row["from"] for row in choices("any", device, size=2)] == [2]
    assert choices("any", device, size=3) == ()


def test_more_rows_than_were_measured_are_borrowed(two_tables: None) -> None:
    found = choices("any", torch.device("cpu"), size=4)
    assert [(row["max_rows"], row["from"]) for row in found] == [(4, "H200"), (8, "H100")]
    assert choose(found, 9) is None


def test_every_row_is_of_a_device_that_is_described() -> None:
    known = {device.name for device in tuning.measured_devices()}
    for file in tuning.FOLDER.iterdir():
        if file.name == "devices.json":
            continue
        rows = json.loads(file.read_text())
        assert {row["device"] for row in rows} <= known, file.name
        assert all(row["max_rows"] >= 1 for row in rows), file.name


def test_tiles_of_the_most_places_measured_serve_any_more() -> None:
    few, many = {"max_rows": 64, "BLOCK_M": 16}, {"max_rows": 4096, "BLOCK_M": 64}
    assert choose_tiles((few, many), 4097) is many
    assert choose_tiles((few, many), 64) is few
    assert choose_tiles((few,), 65) is None  # tiles for few places serve no more than those
    assert choose_tiles((), 1) is None


@pytest.mark.parametrize("operation", ["moe_bf16", "moe_fp8"])
def test_steps_of_prompts_and_decodes_have_measured_tiles(operation: str) -> None:
    """Whatever was tuned, a step may hold some rows more than any that was measured."""
    shapes = {
        (row["experts"], row["hidden"], row["middle"])
        for row in tuning.rows_of(operation, "H200") + tuning.rows_of(operation, "H100")
    }
    for experts, hidden, middle in shapes:
        rows = [
            row
            for table in ("H200", "H100")
            for row in tuning.rows_of(operation, table)
            if (row["experts"], row["hidden"], row["middle"]) == (experts, hidden, middle)
        ]
        found = tuple(sorted(rows, key=lambda row: int(row["max_rows"])))
        assert choose_tiles(found, 1 << 20) is not None, (experts, hidden, middle)
