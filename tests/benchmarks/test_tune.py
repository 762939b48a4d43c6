"""Which sweeps a word means, and that tables keep what was not swept. Measures nothing."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu_fp8_linear, tune
from core.gpu_tools import tuning


def test_a_word_names_a_program_and_the_beginning_of_shapes() -> None:
    everything = tune.chosen([], [])
    assert {sweep.program for sweep in everything} == {"attention", "moe", "linear", "fp8_linear"}
    names = [sweep.name for sweep in tune.chosen(["linear:8b_tp2", "moe:deepseek_v3_ep2"], [1, 8])]
    assert "linear-8b_tp2_qkv" in names
    assert "moe-deepseek_v3_ep2_all" in names
    assert not any(name.startswith("linear-30b") for name in names)
    with pytest.raises(SystemExit, match=r"no shape is meant by linear:none.*linear:8b_qkv"):
        tune.chosen(["linear:none"], [])


def test_a_sweep_is_run_with_its_rows_in_a_folder_of_its_own() -> None:
    (sweep,) = tune.chosen(["attention:llama31_8b"], [1, 64])
    command = sweep.command(Path("sweeps"))
    assert command[2:4] == ["benchmarks.gpu_attention", "--sweep"]
    assert command[-5:] == ["--sequences", "1", "64", "--write", "sweeps/attention-llama31_8b"]


def test_rows_of_other_devices_and_shapes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "linear_fp8.json"
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    size_O, size_I, gated = gpu_fp8_linear.SHAPES["q_b"]
    shape = {"outputs": size_O, "inputs": size_I, "gated": gated, "path": "vendor", "us": 9.0}
    kept = [
        {"device": "H100", **shape, "max_rows": 8},
        {"device": "H200", **shape, "inputs": 1, "max_rows": 8},
    ]
    gone = {"device": "H200", **shape, "max_rows": 16}
    table.write_text(json.dumps([*kept, gone]))
    swept = [
        {"device": "H200", "shape": "q_b", "rows": 8, "us": us, "tile": {"path": path}}
        for us, path in ((3.0, "tiles"), (5.0, "vendor"))
    ]
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps(swept))
    gpu_fp8_linear.write_table([sweep])
    rows = json.loads(table.read_text())
    assert all(row in rows for row in kept)
    assert gone not in rows
    (new,) = [row for row in rows if row not in kept]
    assert (new["device"], new["max_rows"], new["path"]) == ("H200", 8, "tiles")
