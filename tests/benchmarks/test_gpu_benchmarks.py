"""The arithmetic of the GPU benchmarks: floors, profiles, ratios, cells. Times nothing."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import gpu_a2a, gpu_engine, gpu_heat, gpu_profile
from benchmarks import gpu_cells as cells
from benchmarks.emulated_rank import DEEPSEEK_V3, first_plan, later_plan, layer_bytes
from benchmarks.gpu_floor import Device, sizes_of

H100 = Device(name="H100", bytes_per_s=3.0e12, bf16_flops=795e12, fp8_flops=1290e12)
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
QWEN3_24 = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


@pytest.mark.parametrize(
    ("shape", "batch", "floor_ms"),
    [
        (LLAMA_8B, 1, 5.1),
        (LLAMA_8B, 8, 5.4),
        (LLAMA_8B, 64, 7.9),
        (LLAMA_8B, 256, 16.4),
        (QWEN3_24, 1, 1.1),
        (QWEN3_24, 8, 4.3),
        (QWEN3_24, 256, 14.7),
    ],
)
def test_floors_agree_with_the_known_ones(shape, batch, floor_ms) -> None:
    found = sizes_of(shape).decode_s(batch, batch * 1088, H100) * 1e3
    assert found == pytest.approx(floor_ms, rel=0.06)


def test_sizes_of_llama_are_those_of_its_files() -> None:
    sizes = sizes_of(LLAMA_8B)
    assert sizes.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    assert sizes.kv_token_bytes == 131072
    assert sizes.distinct_experts(100) == 0


@pytest.mark.parametrize(("batch", "context", "floor_us"), [(32, 1024, 292), (128, 4096, 461)])
def test_floors_of_a_deepseek_layer(batch: int, context: int, floor_us: float) -> None:
    moe_bytes, _ = layer_bytes(DEEPSEEK_V3, 16, batch, context)
    assert moe_bytes / 3.35e12 * 1e6 == pytest.approx(floor_us, rel=0.01)


def test_made_up_contexts_have_pages_of_their_own() -> None:
    first = first_plan(3, 140)
    assert len(set(first.table_pages)) == len(first.table_pages) > 3
    assert 0 not in first.table_pages
    assert first.starts == [139] * 3
    third = later_plan(first, 2)
    assert third.starts == [141] * 3
    assert not third.table_pages
    assert not third.inits


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict:
    return {"name": name, "ts": ts, "dur": dur, "cat": cat}


def test_a_profile_counts_overlaps_once_and_gaps_between() -> None:
    summary = gpu_profile.summarise(
        [
            event("b", 30, 10),
            event("a", 0, 10),
            event("a", 8, 12),  # overlaps the first
            event("copy", 22, 2, "gpu_memcpy"),
            event("host", 0, 1000, "cpu_op"),
        ],
        num_steps=2,
    )
    assert summary["kernels_a_step"] == 2
    assert summary["busy_us"] == (20 + 2 + 10) / 2
    assert summary["gap_us"] == (2 + 6) / 2
    assert summary["gaps"] == 1
    assert [row["kernel"] for row in summary["top"]] == ["a", "b", "copy"]
    assert summary["top"][0] == {"kernel": "a", "count": 1, "us": 11, "mean_us": 11}
    assert "busy" in gpu_profile.table(summary)
    assert gpu_profile.summarise([], 1)["top"] == []


def test_idle_between_replayed_steps() -> None:
    def of(correlation: int, *spans: tuple[float, float]) -> list[dict]:
        made = [event("k", ts, dur) for ts, dur in spans]
        return [one | {"args": {"correlation": correlation}} for one in made]

    first = of(1, (0, 10), (12, 8), (22, 8))
    copy = of(2, (33, 2))
    second = of(3, (36, 4), (42, 8), (50, 1))
    third = of(4, (51, 4), (56, 1), (58, 1))
    found = gpu_profile.between_steps([*third, *copy, *first, *second])
    assert found == [3 + 1, 0]
    assert gpu_profile.between_steps([]) == []


def test_prompts_of_a_cell_are_the_same_each_time() -> None:
    asked = []
    for _ in range(2):
        cells.seconds(lambda prompts, _: asked.append(prompts), [4, 5], 1)
    assert asked[0] == asked[1]
    assert [len(prompt) for prompt in asked[0]] == [4, 5]


@pytest.mark.parametrize(
    ("count", "rows", "ours", "drawn_twice"), [(128, 8, 51.6, 50.5), (256, 32, 163.3, 162.0)]
)
def test_distinct_experts(count: int, rows: int, ours: float, drawn_twice: float) -> None:
    assert cells.distinct_experts(count, 8, rows) == pytest.approx(ours, abs=0.05)
    found = cells.distinct_experts(count, 8, rows, replacement=True)
    assert found == pytest.approx(drawn_twice, abs=0.05)
    assert cells.distinct_experts(*cells.experts_of(LLAMA_8B), rows) == 0
    assert cells.experts_of(QWEN3_24) == (128, 8)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cells.add_arguments(parser)
    return parser.parse_args(["model", *words])


def test_limits_hold_every_cell() -> None:
    assert cells.limits(arguments("1,8")) == (4096, 8)
    assert cells.limits(arguments("1", "8000", "100")) == (8101, 4)
    assert cells.limits(arguments("-", "--prefill", "16x2048")) == (4096, 16)
    assert cells.limits(arguments("1", "--mixed")) == (16384 + 129, 64)


def test_mixed_lengths_are_the_same_everywhere() -> None:
    lengths = cells.mixed_lengths()
    assert lengths == cells.mixed_lengths()
    assert (len(lengths), min(lengths), max(lengths)) == (64, 256, 16384)


def test_every_cell_is_measured() -> None:
    asked = []

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        asked.append((len(prompts), len(prompts[0]), new_tokens))

    words = ("2", "16", "4", "--prefill", "3x32", "--ttft", "--mixed", "--repeats", "1")
    rows = list(cells.measure(generate, arguments(*words)))
    assert [row["cell"] for row in rows] == ["decode", "prefill", "ttft", "mixed"]
    assert {(2, 16, 1), (2, 16, 5), (3, 32, 1), (1, 1024, 1)} <= set(asked)


PERFORMANCE = """
    Clocks Event Reasons
            HW Thermal Slowdown                        : Not Active
    Clocks Event Reasons Counters
        SW Power Capping                               : 299071852 us
        SW Thermal Slowdown                            : {} us
        HW Thermal Slowdown                            : {} us
"""


def test_the_drivers_counters_are_read() -> None:
    before, after = (
        gpu_heat.parsed(PERFORMANCE.format(*counts))
        for counts in ((318700709, 84769323), (318900709, 86269323))
    )
    assert before == [318.700709, 84.769323]
    assert gpu_heat.hot_s(before, after) == 1.5
    assert gpu_heat.parsed("Failed to initialize NVML: Driver Not Loaded") == []
    assert gpu_heat.hot_s([], []) is gpu_heat.hot_s([1.0, 2.0], []) is None


def test_a_hot_device_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look covers 30.1 seconds, the second 20."""
    counters = iter([[1.0, 5.0], [1.2, 6.5], [1.2, 8.0]])
    clock = iter([100.0, 130.1, 200.0, 220.0, 220.0])
    monkeypatch.setattr(gpu_heat, "counters_s", lambda: next(counters))
    monkeypatch.setattr(gpu_heat.time, "perf_counter", lambda: next(clock))
    watch = gpu_heat.Watch()
    assert watch.look() == (pytest.approx(30.1), 1.5)
    with pytest.raises(SystemExit, match=r"too hot for its clocks in 1\.5 of 20\.0 seconds"):
        watch.look()


def test_nobody_counts_heat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_heat, "counters_s", list)
    assert gpu_heat.Watch().look()[1] is None


def test_ratios_are_to_the_fastest_peer() -> None:
    key = {"cell": "decode", "batch": 8, "isl": 1024, "osl": 128}
    found = {
        "nodeweave": [{"startup_s": 10.0}, key | {"decode_tok_s": 200, "tpot_ms": 5.0}],
        "vllm": [{"startup_s": 50.0}, key | {"decode_tok_s": 100, "tpot_ms": 10.0}],
        "sglang": [{"startup_s": 30.0}, key | {"decode_tok_s": 160, "tpot_ms": 6.25}],
    }
    start, decode = gpu_engine.ratios(found)
    assert start["to_fastest"] == {"startup_s": 3.0}
    assert decode["vllm"] == {"decode_tok_s": 2.0, "tpot_ms": 2.0}
    assert decode["to_fastest"] == {"decode_tok_s": 1.25, "tpot_ms": 1.25}


def test_the_better_of_two_runs() -> None:
    first = [{"cell": "decode", "batch": 1, "decode_tok_s": 10, "tpot_ms": 2.0}]
    second = [{"cell": "decode", "batch": 1, "decode_tok_s": 9, "tpot_ms": 1.9}, {"cell": "ttft"}]
    merged = gpu_engine.better(first, second)
    assert merged == [
        {"cell": "decode", "batch": 1, "decode_tok_s": 10, "tpot_ms": 1.9},
        {"cell": "ttft"},
    ]
    assert gpu_engine.better(None, second) == second


def test_our_child_gets_no_peers() -> None:
    words = ["m", "1", "--peer", "vllm=x y", "--ttft", "--rounds=2", "--peer-python", "p"]
    assert gpu_engine.without_peer_options(words) == ["m", "1", "--ttft"]


def test_rates_of_a_cell_are_those_of_its_seconds() -> None:
    seconds = {1: 2.0, 9: 2.5}  # by new tokens
    row = cells.rates(lambda _, new_tokens: seconds[new_tokens], [100, 300], 8)
    assert (row["isl"], row["osl"]) == (200, 8)
    assert row["prefill_tok_s"] == 200
    assert row["decode_tok_s"] == 2 * 8 / 0.5
    assert row["tpot_ms"] == 500 / 8
    assert row["run_tok_s"] == round((400 + 2 * 9) / 2.5)


def test_times_of_an_all_to_all_replace_those_of_the_same_rows(tmp_path: Path) -> None:
    table = tmp_path / "moe_a2a.json"
    common = {"device": "H200", "one_host": True, "ranks": 2, "hidden": 7168, "fp8": True}
    first = [common | {"rows": rows, "us": {"nccl": 9.0}} for rows in (64, 1)]
    gpu_a2a.write_table(table, first)
    other = common | {"rows": 64, "us": {"nccl": 7.0, "symm_mem": 3.0}}
    gpu_a2a.write_table(table, [other])
    assert json.loads(table.read_text()) == [first[1], other]
    assert len(table.read_text().splitlines()) == 4, "a line a row"
