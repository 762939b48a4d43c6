"""Honest streams on a real server while everything hostile that we know happens to it.

    python -m benchmarks.hostile_load [--minutes 30] [--streams 16] [--idle 500] [--rate 1]
        [--dtype float32] [--log FILE] [core.run's words ...]

Starts SmolLM2 with `python -m core.run`, and beside it an engine of two nodes with a tiny model,
whose ports strangers attack (with one honest stream of its own). Attackers (`attackers.py`), honest
clients (`honest.py`) and servers are processes of their own; this one watches memory and
descriptors. Prints one JSON line, and ends with status 1 where a stream was lost, wrong or
refused or had a gap of 2 s or more, memory or descriptors grew, a request was answered with 500,
or a server did not end well: `problems` says which.

The default rates fit a machine of two cores that computes, attacks and measures at once; `--rate`
is a factor on them.
"""

import argparse
import json
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hostile_load.verdict import problems
from benchmarks.hostile_load.watch import Watch, over_time
from tests.support.models import write_tiny_model
from tests.support.server import Server, running_server
from tests.support.two_nodes import Node

TIE = {"float32": 0.002, "bfloat16": 0.25}  # distance of logprobs that other traffic may turn over
MODEL, TINY = "smollm2", "tiny"
SETTLE_S = 150.0  # in which what attackers left behind is gone


def note(text: str) -> None:
    """A line for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Child:
    """A process of this package that reads JSON lines and prints some."""

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.hostile_load.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.say(json.dumps(settings))

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return dict(json.loads(line))

    def end(self) -> dict[str, Any]:
        """Close its input; what it prints then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        row = self.hear()
        self._process.wait()
        return row

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def free_base_port() -> int:
    """A port after which the others of a run are free as well."""
    while True:
        base = 21_000 + secrets.randbelow(9_000)
        try:
            for port in (*range(base, base + 4), base + 16):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return base


@contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Both nodes of a small engine, on loopback."""
    model = write_tiny_model(folder / TINY, "llama")
    environment = {"NODEWEAVE_CLUSTER_TOKEN": secrets.token_hex(32)}
    words = ["+model=custom", f"model.path={model}", "parallel.tp=2", "launch.nnodes=2",
             f"launch.dist_init_addr=127.0.0.1:{free_base_port()}", "frontend.port=0",
             "engine.kv_cache_tokens=4096", "launch.threads_per_worker=1"]  # fmt: skip
    nodes = [Node([*words, f"launch.node_rank={rank}"], environment, []) for rank in (0, 1)]
    try:
        nodes[0].wait_for("http://")
        yield nodes
    finally:
        for node in nodes:
            if node.process.poll() is None:
                for child in psutil.Process(node.process.pid).children(recursive=True):
                    child.kill()
                node.process.kill()
                node.process.wait()


def open_ports(nodes: Sequence[Node]) -> list[tuple[str, int]]:
    """(whose, port) of every TCP port that their processes listen at, but HTTP's."""
    found = []
    for rank, node in enumerate(nodes):
        root = psutil.Process(node.process.pid)
        for process in [root, *root.children(recursive=True)]:
            role = process.cmdline()[2]
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    port = connection.laddr.port
                    if f":{port}/" not in node.text and f":{port}\n" not in node.text:
                        found.append((f"node {rank} {role} {port}", port))
                    elif role == "core.run":
                        found.append((f"node {rank} control {port}", port))
    return found


def url_of(node: Node) -> str:
    return next(word for word in node.text.split() if word.startswith("http://"))


def metrics(url: str) -> dict[str, float]:
    """The server's numbers by name and labels, without the prefix and the model's name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    rows = [line.rsplit(" ", 1) for line in lines if line.startswith("nodeweave_")]
    return {name.removeprefix("nodeweave_"): float(value) for name, value in rows}


def wait_idle(url: str) -> dict[str, float]:
    """The numbers once no request is under way; the last ones where that never comes."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        now = metrics(url)
        live = sum(value for name, value in now.items() if name.startswith("num_requests_live"))
        if live == 0 or time.monotonic() > deadline_s:
            return now
        time.sleep(1)


def measure(arguments: argparse.Namespace, server: Server, nodes: list[Node]) -> dict[str, Any]:
    """Everything between two servers that are ready and their end."""
    seconds = arguments.minutes * 60
    _, port = server.url.removeprefix("http://").split(":")
    common = {"seed": arguments.seed, "tie": TIE[arguments.dtype]}
    streams = {"url": server.url, "model": MODEL, "streams": arguments.streams, "pause_s": 0.05}
    children = {"honest": Child("honest", common | streams | {"paragraphs": [0, 1, 9]})}
    roots = {"": psutil.Process(server.process.pid)}
    if nodes:
        streams = {"url": url_of(nodes[0]), "model": TINY, "streams": 1, "pause_s": 1.5}
        children["honest_nodes"] = Child("honest", common | streams | {"paragraphs": [0]})
        for rank, node in enumerate(nodes):
            roots[f"node {rank} "] = psutil.Process(node.process.pid)
    note("both engines serve")
    try:
        for child in children.values():
            child.hear()
        note("the honest streams' answers are known; they run alone")
        for child in children.values():
            child.say("quiet")
        time.sleep(arguments.quiet_s)
        watch = Watch(roots)
        for child in children.values():
            child.say("attack")
        children["attackers"] = Child(
            "attackers",
            {
                "target": {"host": "127.0.0.1", "port": int(port), "model": MODEL},
                "ports": open_ports(nodes),
                "idle": arguments.idle,
                "rate": arguments.rate,
                "seed": arguments.seed,
            },
        )
        note("the attack begins")
        time.sleep(seconds)
        note("the attack ends")
        attackers = children["attackers"].end()
        rows = {name: child.end() for name, child in children.items() if name != "attackers"}
    finally:
        for child in children.values():
            child.kill()
    after = wait_idle(server.url)
    time.sleep(10)
    watch.close()
    return {
        "minutes": arguments.minutes,
        "dtype": arguments.dtype,
        **rows,
        "attackers": attackers,
        "memory": over_time(watch.samples),
        "metrics": told(after),
        "_samples": watch.samples,
    }


def told(values: dict[str, float]) -> dict[str, float]:
    """The numbers that a reader wants to see."""
    wanted = (
        "num_requests", "kv_cache_pages", "http_responses_total", "http_connections", "log_lines",
        "prompt_tokens", "generation_tokens", "event_loop_blocked_seconds_bucket",
    )  # fmt: skip
    return {name: value for name, value in values.items() if name.startswith(wanted)}


def ended(stop: Any) -> dict[str, float]:
    begin_s = time.monotonic()
    status = stop()
    return {"status": status, "seconds": round(time.monotonic() - begin_s, 2)}


def stop_nodes(nodes: Sequence[Node]) -> int:
    """SIGTERM to the second; the worst status."""
    nodes[1].process.terminate()
    return max(abs(node.wait(60)) for node in nodes)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    words = [f"+model={MODEL}", f"model.dtype={arguments.dtype}", *arguments.words]
    nodes: list[Node] = []
    with tempfile.TemporaryDirectory() as folder, running_server(*words) as server:
        assert server.url
        with two_nodes(Path(folder)) as nodes:
            try:
                row = measure(arguments, server, nodes)
                row["end"] = ended(server.stop)
                row["end_nodes"] = ended(lambda: stop_nodes(nodes))
            finally:
                texts = [server.text, *(node.text for node in nodes)]
                if arguments.log:
                    Path(arguments.log).write_text("\n---- next ----\n".join(texts))
    row["tracebacks"] = sum(text.count("Traceback") for text in texts)
    return row


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the attack")
    parser.add_argument("--streams", type=int, default=16, help="honest ones at a time")
    parser.add_argument("--idle", type=int, default=500, help="connections that do nothing")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on every kind's rate")
    parser.add_argument("--quiet-s", type=float, default=30.0, help="of honest streams alone")
    parser.add_argument("--dtype", choices=sorted(TIE), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", help="file for what the servers print")
    parser.add_argument("words", nargs="*", help="further words of core.run")
    return parser.parse_args(words)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then
    row = run(parsed())
    samples = row.pop("_samples")
    row["problems"] = problems(row, samples)
    print(json.dumps(row), flush=True)
    sys.exit(1 if row["problems"] else 0)


if __name__ == "__main__":
    main()
