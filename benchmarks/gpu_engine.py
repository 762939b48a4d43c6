"""Offline rates of this engine on one GPU with dummy weights, beside a peer's and the floors.

    python -m benchmarks.gpu_engine MODEL_DIR BATCHES [PROMPT_TOKENS] [NEW_TOKENS] [options]
    python -m benchmarks.gpu_engine .gpu/models/llama8b 1,8,64,256 --prefill 16x2048 --ttft \\
        --peer vllm="PYTHONPATH=/tmp/site python3 benchmarks/gpu_peer.py vllm"

MODEL_DIR holds a config.json (or is one). Random prompts, greedy, no prefix cache; each engine in a
process of its own, one at a time. Prints a JSON line for each cell (see `benchmarks.gpu_cells`),
with the floor and the share of it that was reached; with peers, ours and they take turns, the best
of an engine's `--rounds` counts, and lines with the ratios follow. `--profile` names the ten most
expensive kernels of a decode step and of a prefill instead, and the gaps between kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_cells as cells
from benchmarks import gpu_floor, gpu_heat, gpu_profile

Row = dict[str, Any]
PROFILED_STEPS = 8
HIGHER_IS_BETTER = ("prefill_tok_s", "decode_tok_s", "run_tok_s", "floor_share")
LOWER_IS_BETTER = ("tpot_ms", "ttft_ms", "startup_s", "process_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cells.add_arguments(parser)
    parser.add_argument("--uniform-routing", action="store_true", help="experts drawn at random")
    parser.add_argument("--max-prefill-tokens", type=int, help="prompt tokens of a step")
    parser.add_argument("--chunked-prefill-size", type=int, help="of one request in a step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="engine.KEY")
    parser.add_argument("--device", default="cuda", help="cpu: to try the program, small shapes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--peer-python", help="a Python with vLLM: short for --peer vllm=...")
    parser.add_argument("--rounds", type=int, default=1, help="turns of ours and peers")
    parser.add_argument("--ours", action="store_true", help="this process measures; no peers")
    arguments = parser.parse_args()
    if arguments.ours:
        run_ours(arguments)
        return
    if arguments.peer_python:
        script = Path(__file__).with_name("gpu_peer.py")
        arguments.peer.append(f"vllm={arguments.peer_python} {script} vllm")
    compare(arguments, sys.argv[1:])


def run_ours(arguments: argparse.Namespace) -> None:
    """Build the engine in this process and print its rows."""
    shape, name = shape_of(Path(arguments.model_dir))
    common: Row = {"engine": "nodeweave", "model": name}
    if arguments.uniform_routing:
        common["routing"] = "uniform_random"
    device = None
    if arguments.device == "cuda":
        watch = gpu_heat.Watch()
        device = gpu_floor.measure_device()
        watch.look()
        cells.put(common | device.describe())
    begin = time.perf_counter()
    from core.engine.local.in_process import build_in_process, offline_in_process
    from core.interfaces.messages import SamplingParams

    phases: dict[str, float] = {}
    lone = build_in_process(
        configuration(arguments, shape, name),
        on_phase=lambda phase, seconds: phases.__setitem__(phase, round(seconds, 2)),
    )
    engine = offline_in_process(lone)
    startup_s = round(time.perf_counter() - begin, 1)
    cells.put(common | {"startup_s": startup_s, "phases": phases} | lone.engine.describe())

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        vocab = shape["vocab_size"]
        if vocab <= cells.MAX_ID:
            prompts = [[token % vocab for token in prompt] for prompt in prompts]
        answers = engine.generate(prompts, params)
        assert all(len(answer.token_ids) == new_tokens for answer in answers)

    if arguments.profile:
        for row in profiles(engine, generate, arguments):
            print(gpu_profile.table(row), file=sys.stderr, flush=True)
            cells.put(common | row)
        return
    sizes = gpu_floor.sizes_of(shape)
    for row in cells.measure(generate, arguments):
        if arguments.uniform_routing and row["cell"] == "decode":
            row["distinct_experts"] = round(sizes.distinct_experts(row["batch"]), 1)
        cells.put(common | row | (floors(row, sizes, device) if device else {}))


def shape_of(path: Path) -> tuple[Row, str]:
    """A config.json and the model's name."""
    file = path / "config.json" if path.is_dir() else path
    name = path.name if path.is_dir() else path.stem
    return json.loads(file.read_text()), name


def configuration(arguments: argparse.Namespace, shape: Row, name: str) -> Any:
    """As a server of these cells would be configured."""
    from core.settings.config import AppConfig
    from core.settings.schema import build

    longest, requests = cells.limits(arguments)
    engine: Row = {
        "device": arguments.device,
        "disable_prefix_cache": True,
        "max_running_requests": requests,
    }
    for key in ("max_prefill_tokens", "chunked_prefill_size"):
        if getattr(arguments, key) is not None:
            engine[key] = getattr(arguments, key)
    for word in arguments.set:
        key, _, value = word.partition("=")
        engine[key] = json.loads(value)
    model: Row = {
        "name": name,
        "shape": shape,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": min(longest, shape["max_position_embeddings"]),
    }
    if arguments.uniform_routing:
        model["expert_routing"] = "uniform_random"
    return build(AppConfig, {"model": model, "engine": engine})


def parse_alone(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a program that measures no cells, but an engine at its `--batch`, together with
    what `configuration` reads of a run with cells."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="engine.KEY")
    parser.add_argument("--uniform-routing", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: to try the program, small shapes")
    arguments = parser.parse_args(words)
    arguments.batches = str(arguments.batch)
    arguments.prefill, arguments.mixed = None, False
    arguments.max_prefill_tokens = arguments.chunked_prefill_size = None
    return arguments


def floors(row: Row, sizes: gpu_floor.Sizes, device: gpu_floor.Device) -> Row:
    """The least milliseconds that the device allows a step of this cell, or a prefill."""
    if row["cell"] in ("decode", "mixed"):
        context = row["isl"] + row["osl"] / 2
        floor_ms = sizes.decode_s(row["batch"], row["batch"] * context, device) * 1e3
        return {"floor_ms": round(floor_ms, 3), "floor_share": round(floor_ms / row["tpot_ms"], 3)}
    floor_ms = sizes.prefill_s(row["batch"], row["isl"], device) * 1e3
    took_ms = row.get("ttft_ms") or row["batch"] * row["isl"] / row["prefill_tok_s"] * 1e3
    return {"floor_ms": round(floor_ms, 3), "floor_share": round(floor_ms / took_ms, 3)}


def profiles(engine: Any, generate: cells.Generate, arguments: argparse.Namespace) -> Iterator[Row]:
    """A decode step of each batch size, and the prefill cell (or one prompt)."""
    for batch in cells.batches_of(arguments):
        events = decode_events(engine, batch, arguments.isl)
        row: Row = {"cell": "decode", "batch": batch, "isl": arguments.isl}
        yield row | gpu_profile.summarise(events, PROFILED_STEPS)
    batch, tokens = cells.prefill_of(arguments) or (1, cells.TTFT_TOKENS)
    cells.seconds(generate, [tokens] * batch, 1)
    events = gpu_profile.traced(lambda: cells.seconds(generate, [tokens] * batch, 1))
    yield {"cell": "prefill", "batch": batch, "isl": tokens} | gpu_profile.summarise(events, 1)


def decode_events(engine: Any, batch: int, isl: int) -> list[Row]:
    """Trace events of some decode steps, long after the prompts were computed."""
    from core.interfaces.messages import SamplingParams

    params = SamplingParams(max_tokens=4096, temperature=0.0, ignore_eos=True)
    prompt = [7 + i % 80 for i in range(isl)]
    names = [engine.submit(prompt, params) for _ in range(batch)]
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in engine.step()}
    for _ in range(4):
        engine.step()
    events = gpu_profile.traced(lambda: [engine.step() for _ in range(PROFILED_STEPS)])
    from core.interfaces.messages import Abort

    engine.send(Abort(names))
    while engine.has_work:
        engine.step()
    return events


def compare(arguments: argparse.Namespace, words: list[str]) -> None:
    """Ours, then each peer, in turns."""
    peers = dict(text.split("=", 1) for text in arguments.peer)
    words = without_peer_options(words)
    cell_words = cells_only(arguments)
    found: dict[str, list[Row]] = {}
    for _ in range(arguments.rounds):
        rows = child_rows(
            [sys.executable, "-m", "benchmarks.gpu_engine", *words, "--ours"], needed=True
        )
        found["nodeweave"] = better(found.get("nodeweave"), rows)
        for name, command in peers.items():
            rows = child_rows(f"{command} {' '.join(cell_words)}")
            found[name] = better(found.get(name), rows)
    if peers:
        for row in ratios(found):
            cells.put(row)


def without_peer_options(words: list[str]) -> list[str]:
    """Our own child's arguments."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--peer", "--peer-python", "--rounds"):
            skip = True
        elif not word.startswith(("--peer=", "--peer-python=", "--rounds=")):
            kept.append(word)
    return kept


def cells_only(arguments: argparse.Namespace) -> list[str]:
    """The arguments that all engines take."""
    folder = Path(arguments.model_dir)
    words = [str(folder), arguments.batches, str(arguments.isl), str(arguments.osl)]
    words += ["--repeats", str(arguments.repeats)]
    if arguments.prefill:
        words += ["--prefill", arguments.prefill]
    return words + [f"--{name}" for name in ("mixed", "ttft") if getattr(arguments, name)]


def child_rows(command: list[str] | str, *, needed: bool = False) -> list[Row]:
    """The JSON lines of a process, which go to our output too. One that fails is told of, and what
    it had printed counts; if it is `needed`, nothing more is run. `process_s`: from its start to
    the line with its start-up."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, shell=isinstance(command, str), stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    rows: list[Row] = []
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if "startup_s" in row:
            row["process_s"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        cells.put(row)
    if process.wait() != 0:
        message = f"failed with {process.returncode}: {command}"
        if needed:
            raise SystemExit(message)
        print(message, file=sys.stderr, flush=True)
    return rows


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes two rows comparable."""
    return row.get("cell", "startup"), row.get("batch"), row.get("isl"), row.get("osl")


def better(first: list[Row] | None, second: list[Row]) -> list[Row]:
    """Cell by cell, the better figures of two runs of an engine."""
    if first is None:
        return second
    later = {key_of(row): row for row in second}
    earlier = {key_of(row) for row in first}
    merged = []
    for row in first:
        other = later.get(key_of(row), row)
        best = dict(row)
        best |= {key: max(row[key], other[key]) for key in HIGHER_IS_BETTER if key in row}
        best |= {key: min(row[key], other[key]) for key in LOWER_IS_BETTER if key in row}
        merged.append(best)
    return merged + [row for row in second if key_of(row) not in earlier]


def ratios(found: dict[str, list[Row]]) -> Iterator[Row]:
    """For each cell that peers ran too: how many times faster we are than each, and than the
    fastest of them. Above 1 is ours ahead, for rates as for seconds."""
    mine = {key_of(row): row for row in found["nodeweave"]}
    theirs = {name: {key_of(r): r for r in rows} for name, rows in found.items()}
    del theirs["nodeweave"]
    for key, row in mine.items():
        result: Row = {"ratio_of": key[0], "batch": key[1], "isl": key[2]}
        for name, rows in theirs.items():
            peer = rows.get(key)
            if peer is not None:
                result[name] = faster(row, peer)
        compared = [result[name] for name in theirs if result.get(name)]
        if compared:
            result["to_fastest"] = {
                figure: min(each[figure] for each in compared if figure in each)
                for figure in compared[0]
            }
            yield result


def faster(row: Row, peer: Row) -> dict[str, float]:
    """How many times faster `row` is, by figure."""
    rates = {k: row[k] / peer[k] for k in HIGHER_IS_BETTER if k in row and k in peer}
    times = {k: peer[k] / row[k] for k in LOWER_IS_BETTER if k in row and k in peer and row[k]}
    return {key: round(ratio, 3) for key, ratio in (rates | times).items()}


if __name__ == "__main__":
    main()
