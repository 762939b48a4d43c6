"""`python -m core.plan`: what it prints, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.plan import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    out, err = capsys.readouterr()
    return status, out, err


def test_tables_are_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "+model=deepseek_v3", "parallel=tp16_ep16", "--nodes", "2")
    assert (status, err) == (0, "")
    assert "671.03B parameters (671,026,419,200)" in out
    assert "16 ranks on 2 nodes" in out
    assert "every parameter is held by at least one rank" in out
    assert "70,272 bytes a token" in out
    lines = out.splitlines()
    ranks = lines[lines.index("ranks") + 2 : lines.index("tensors") - 1]
    assert len(ranks) == 16
    assert ranks[9].split() == ["9", "1", "0", "0", "9", "9", "0", "16", "45.60", "GB"]
    assert any(line.split() == ["20001", "0", "store", "every", "rank"] for line in lines)
    assert "files:" not in out


def test_json_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "+model=llama31_405b",
        "parallel=tp32",
        "--json",
        "--nodes",
        "4",
        "--base-port",
        "7000",
    ]
    status, out, _ = run(capsys, *words)
    found: dict[str, Any] = json.loads(out)
    assert status == 0
    assert found["report"]["num_parameters"] == 405_853_388_800
    assert [rank["node"] for rank in found["report"]["ranks"]] == [
        n for n in range(4) for _ in range(8)
    ]
    assert found["ports"][0]["port"] == 7000
    assert found["report"]["plan"]["tp_attn"] == 32


def test_one_node_opens_no_ports(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "+model=qwen3_8b", "parallel=tp2")
    assert "ports" not in out


def test_a_random_checkpoints_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "+model=qwen3_moe_tiny", "--json")
    folder = Path(json.loads(out)["files"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    _, out, _ = run(capsys, "+model=qwen3_moe_tiny")
    assert f"files: {folder}" in out


def test_a_folder_without_a_tokenizer_is_planned(
    capsys: pytest.CaptureFixture[str], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_llama_folder / name)
    status, out, err = run(capsys, "+model=custom", f"model.path={tmp_path}")
    assert (status, err) == (0, "")
    assert f"files: {tmp_path}" in out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (
            ["+model=deepseek_v3", "parallel=tp32"],
            ["parallel.tp=32", "multiples of 128", "1, 2, 4"],
        ),
        (["+model=llama31_405b", "parallel=tp16_ep16"], ["no experts", "parallel.ep"]),
        (["+model=qwen3_8b", "--nodes", "2"], ["2 nodes", "allowed: 1"]),
        (["+model=qwen3_8b", "--nodes", "two"], ["--nodes", "two"]),
        (["+model=nothing"], ["nothing", "qwen3_8b"]),
        (
            ["+model=deepseek_v3", "engine.kv_cache_tokens=63"],
            ["engine.kv_cache_tokens=63 is out of range; allowed: at least 64"],
        ),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str], words: list[str], fragments: list[str]
) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert all(fragment in err for fragment in fragments), err


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "--base-port" in out


def test_other_servers_flags_are_answered_with_the_line_to_type(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, "--model", "qwen3_8b", "--tp", "2", "--nodes", "1", "--json")
    assert (status, out) == (2, "")
    assert "  python -m core.plan +model=qwen3_8b parallel.tp=2 --nodes 1 --json\n" in err
