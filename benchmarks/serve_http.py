"""Servers under load, seen from a client: ours beside vLLM or SGLang, the same arrivals for all.

    python -m benchmarks.serve_http MODEL_DIR [options] [--set KEY=VALUE ...]
    python -m benchmarks.serve_http .gpu/models/llama8b --until 500 --out rows.jsonl \\
        --peer vllm="PYTHONPATH=/tmp/site python3" \\
        --variant wide="engine.max_running_requests=512"

MODEL_DIR holds a config.json; weights are made up, and so is a tokenizer where there is none. One
server at a time, each with its defaults. Loads (`--loads`):

    all_at_once  every request at the beginning; its output tokens a second are a server's peak
    poisson_40   requests that come by chance, so many that they ask for 40% of the peak
    poisson_70   of 70%
    multi_turn   conversations whose turns repeat what was said before, and share a beginning; 40%

The peak is that of the faster of ours and the first peer (`--peak` gives it instead), so that all
are asked the same. A JSON line for each load of each server, and the ratios to a peer: above 1 ours
is ahead, whatever the figure. A table of it goes to standard error.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_heat
from benchmarks.serving import arrivals, client, report, servers
from benchmarks.serving.arrivals import Lengths, Load

Row = dict[str, Any]
LOADS = ("all_at_once", "poisson_40", "poisson_70", "multi_turn")
PEAK_LOAD = LOADS[0]
SHARES = {"poisson_40": 0.4, "poisson_70": 0.7, "multi_turn": 0.4}
OURS = "ours"
WARM_UP_TOKENS = 16
LEAST_S = 10.0  # with less left, no server is started


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server to be measured, by name."""

    name: str
    server_at: Callable[[int], servers.Server]
    is_peer: bool


@dataclass(slots=True)
class Bench:
    """What was measured so far, and until when there is time (of `time.perf_counter`)."""

    arguments: argparse.Namespace
    folder: Path  # of the model
    lengths: Lengths
    until: float
    logs: Path
    peak: float | None  # output tokens a second
    contestants: Sequence[Contestant] = ()
    rows: list[Row] = field(default_factory=list)

    def put(self, row: Row) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.arguments.out:
            with Path(self.arguments.out).open("a") as out:
                out.write(line + "\n")

    def found(self, name: str, load: str) -> Row | None:
        """A load that was measured to its end."""
        for row in self.rows:
            if (row.get("server"), row.get("load")) == (name, load) and row.get("was_cut") is False:
                return row
        return None

    def left_s(self) -> float:
        return self.until - time.perf_counter()

    def visit(self, contestant: Contestant, loads: Sequence[str], *, settles: bool = True) -> None:
        """Start a server and measure what there is time for. `settles`: the peak is known after
        this one's, at the latest."""
        loads = [load for load in loads if self.found(contestant.name, load) is None]
        if not loads:
            return
        if self.left_s() < self.least_s(contestant, loads):
            self.put({"server": contestant.name, "skipped": "no time left"})
            return
        try:
            with servers.running(contestant.server_at, self.logs, self.until) as (port, ready_s):
                self.put({"server": contestant.name, "ready_s": ready_s} | described(port))
                if (error := self.warm_up(port)) is not None:
                    self.put({"server": contestant.name, "failed": error})
                    return
                for load in loads:
                    self.measure(contestant, port, load)
                    if settles:
                        self.settle_peak()
        except servers.StartError as error:
            self.put({"server": contestant.name, "failed": str(error)})

    def least_s(self, contestant: Contestant, loads: Sequence[str]) -> float:
        """Seconds that starting a server and one of these loads take, as far as is known."""
        kin = {each.name for each in self.contestants if each.is_peer == contestant.is_peer}
        rows = [row for row in self.rows if row.get("server") in kin]
        starts = [row["ready_s"] for row in rows if "ready_s" in row]
        runs = [row["wall_s"] for row in rows if row.get("load") in loads]
        return max(LEAST_S, min(starts, default=0.0) + min(runs, default=0.0))

    def warm_up(self, port: int) -> str | None:
        """What the first requests meet is not told, but why they got no answer, if so."""
        lengths = Lengths(self.lengths.prompt, WARM_UP_TOKENS, self.lengths.vocab)
        count = min(64, self.arguments.requests)
        outcome = self.drive(port, arrivals.singles("warm_up", "warm", count, 0.0, lengths))
        broken = [answer for answer in outcome.answers if not answer.is_whole]
        return f"warm-up: {broken[0].error or 'too few tokens'}" if broken else None

    def measure(self, contestant: Contestant, port: int, name: str) -> None:
        if name in SHARES and self.peak is None:
            self.put({"server": contestant.name, "skipped": f"no peak is known for {name}"})
            return
        times = [row["wall_s"] for row in self.rows if row.get("load") == name and "wall_s" in row]
        if self.left_s() < max(times, default=0.0):
            self.put({"server": contestant.name, "skipped": f"no time left for {name}"})
            return
        load = made_load(name, self.arguments, self.lengths, self.peak or 0.0)
        before = gpu_heat.counters_s()
        outcome = self.drive(port, load)
        row: Row = {"server": contestant.name, "load": name, "rate": round(load.rate, 4)}
        row |= {"in": self.lengths.prompt, "out": self.lengths.answer, "asked": load.num_requests}
        row |= report.summarise(outcome, limits_of(self.arguments), self.arguments.gpus)
        self.put(row | {"hot_s": gpu_heat.hot_s(before, gpu_heat.counters_s())})

    def drive(self, port: int, load: Load) -> client.Outcome:
        return client.drive(servers.HOST, port, self.folder.name, load, self.until)

    def settle_peak(self) -> None:
        """The faster one's of those that were measured so far."""
        rows = [row for row in self.rows if row.get("load") == PEAK_LOAD and not row["was_cut"]]
        if self.peak is None and rows:
            faster = max(rows, key=lambda row: float(row["out_tok_s"]))
            self.peak = faster["out_tok_s"]
            self.put({"peak_tok_s": self.peak, "peak_of": faster["server"]})

    def compare(self) -> None:
        """Ratios of each of ours to each peer, load by load."""
        for load in self.arguments.loads:
            for ours in (each for each in self.contestants if not each.is_peer):
                for peer in (each for each in self.contestants if each.is_peer):
                    mine, theirs = self.found(ours.name, load), self.found(peer.name, load)
                    if mine is not None and theirs is not None:
                        pair = {"server": ours.name, "peer": peer.name, "load": load}
                        self.put(pair | {"ratios": report.ratios(mine, theirs)})


def limits_of(arguments: argparse.Namespace) -> report.Limits:
    return report.Limits(arguments.ttft_limit_ms, arguments.tpot_limit_ms)


def made_load(name: str, arguments: argparse.Namespace, lengths: Lengths, peak: float) -> Load:
    """The same for all servers: its seed is its name. `peak`: output tokens a second."""
    if name == PEAK_LOAD:
        return arrivals.singles(name, arguments.seed, arguments.requests, 0.0, lengths)
    rate = SHARES[name] * peak / lengths.answer
    if name == "multi_turn":
        rate /= arguments.turns
    count = max(math.ceil(rate * arguments.paced_s), 1)
    if name != "multi_turn":
        return arrivals.singles(name, arguments.seed, count, rate, lengths)
    return arrivals.multi_turn(
        name,
        arguments.seed,
        count,
        rate,
        lengths,
        turns=arguments.turns,
        shared_tokens=arguments.shared,
        pause_s=arguments.pause_s,
    )


def run(bench: Bench) -> None:
    """Ours and the peers first, so that they can be compared whatever time there is: the peak of
    ours, all of the peers, then the rest of ours (which starts soon), then variants of ours."""
    loads = bench.arguments.loads
    first, *others = bench.contestants
    peers = [each for each in others if each.is_peer]
    if bench.peak is None and peers:
        bench.visit(first, [PEAK_LOAD], settles=False)
    for peer in peers:
        bench.visit(peer, loads)
    bench.settle_peak()
    bench.visit(first, loads)
    for variant in (each for each in others if not each.is_peer):
        bench.visit(variant, bench.arguments.variant_loads or loads)
    bench.compare()


def described(port: int) -> Row:
    """What a server of ours says it settled; nothing of others."""
    try:
        with urllib.request.urlopen(f"http://{servers.HOST}:{port}/server_info", timeout=5) as got:
            info = json.loads(got.read())
    except (OSError, ValueError):
        return {}
    return {"engine": info["engine"]} if isinstance(info.get("engine"), dict) else {}


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, help="a folder with config.json")
    parser.add_argument("--in", dest="prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--out-tokens", dest="answer", type=int, default=128, help="of an answer")
    parser.add_argument("--requests", type=int, default=512, help="all at once")
    parser.add_argument("--paced-s", type=float, default=20.0, help="seconds of arrivals by rate")
    parser.add_argument("--turns", type=int, default=4, help="of a conversation")
    parser.add_argument("--shared", type=int, default=1024, help="tokens that conversations share")
    parser.add_argument("--pause-s", type=float, default=1.0, help="between turns, on average")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--variant-loads", nargs="+", choices=LOADS, help="of variants of ours")
    parser.add_argument("--peak", type=float, help="output tokens a second, for the paced loads")
    parser.add_argument("--ttft-limit-ms", type=float, default=500.0, help="of goodput")
    parser.add_argument("--tpot-limit-ms", type=float, default=30.0, help="of goodput")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="ours, always")
    parser.add_argument(
        "--variant", action="append", default=[], metavar='NAME="KEY=VALUE ..."', help="ours, too"
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar='NAME="[VAR=X] PYTHON [-- OPTIONS]"',
        help=f"NAME: {', '.join(servers.PEERS)}",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="that a server computes on")
    parser.add_argument("--until", type=float, default=3600.0, help="seconds that all may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file that JSON lines are added to")
    parser.add_argument("--logs", type=Path, help="folder for the servers' output")
    arguments = parser.parse_args(words)
    if arguments.peak is None and PEAK_LOAD not in arguments.loads:
        parser.error(f"without {PEAK_LOAD} among --loads, give --peak")
    arguments.loads = [load for load in LOADS if load in arguments.loads]
    for text in [*arguments.variant, *arguments.peer]:
        if "=" not in text:
            parser.error(f"{text!r} has no name: NAME=...")
    for text in arguments.peer:
        if text.partition("=")[0] not in servers.PEERS:
            parser.error(f"--peer {text!r}: the name is one of {', '.join(servers.PEERS)}")
    return arguments


def contestants_of(arguments: argparse.Namespace, folder: Path, longest: int) -> list[Contestant]:
    """Ours, peers, variants of ours."""
    made = [Contestant(OURS, servers.ours(OURS, folder, longest, arguments.set), False)]
    for text in arguments.peer:
        name, _, command = text.partition("=")
        made.append(Contestant(name, servers.PEERS[name](name, folder, longest, command), True))
    for text in arguments.variant:
        name, _, words = text.partition("=")
        keys = [*arguments.set, *words.split()]
        made.append(Contestant(name, servers.ours(name, folder, longest, keys), False))
    return made


def main(words: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    arguments = parsed(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    with tempfile.TemporaryDirectory() as temporary:
        folder = servers.model_folder(arguments.model_dir.absolute(), Path(temporary))
        config = json.loads((folder / "config.json").read_text())
        logs = arguments.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        lengths = Lengths(arguments.prompt, arguments.answer, config["vocab_size"])
        bench = Bench(
            arguments=arguments,
            folder=folder,
            lengths=lengths,
            until=begin + arguments.until,
            logs=logs,
            peak=arguments.peak,
            contestants=contestants_of(arguments, folder, longest_of(arguments)),
        )
        bench.put({"benchmark": "serve_http", "model": folder.name, "gpu": gpu_name()})
        try:
            run(bench)
        finally:
            print(report.table(bench.rows), file=sys.stderr, flush=True)


def longest_of(arguments: argparse.Namespace) -> int:
    """Tokens of the longest prompt and its answer, with a little room."""
    turn = arguments.prompt + arguments.answer
    whole = arguments.shared + arguments.turns * turn if "multi_turn" in arguments.loads else turn
    return int(max(whole, arguments.prompt + WARM_UP_TOKENS)) + 16


def gpu_name() -> str | None:
    """As its driver says; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.splitlines()[0]


if __name__ == "__main__":
    main()
