"""What the client of `benchmarks.serve_http` costs: streams of a fake engine at a known pace.

    python -m benchmarks.serve_client [--clients 256] [--tokens 200] [--steps-per-second 100]

The frontend is the real one, the engine is `benchmarks.http_layer`'s, which makes a step at a
fixed rate, so that gaps between tokens should be all alike. Told are those that the client saw, how
late its loop was, and the share of a core that it took. Prints JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.http_layer import Stack
from benchmarks.serving import arrivals, client, report
from benchmarks.serving.arrivals import Lengths
from tests.support.small_tokenizer import byte_level, write_folder

PROMPT_TOKENS = 1024


def measure(num_clients: int, num_tokens: int, steps_per_second: float) -> dict[str, Any]:
    lengths = Lengths(PROMPT_TOKENS, num_tokens, byte_level().get_vocab_size())
    load = arrivals.singles("client", 0, num_clients, 0.0, lengths)
    warm = arrivals.singles("warm", 0, 8, 0.0, Lengths(16, 8, lengths.vocab))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        stack = Stack(Path(sockets), steps_per_second, write_folder(Path(folder)))
        try:
            host, port = stack.url.removeprefix("http://").split(":")
            client.drive(host, int(port), "fake", warm, time.perf_counter() + 30)
            outcome = client.drive(host, int(port), "fake", load, time.perf_counter() + 300)
        finally:
            stack.close()
    row = report.summarise(outcome, report.Limits(1e9, 1e9))
    events = sum(len(answer.event_times) for answer in outcome.answers)
    return {
        "clients": num_clients,
        "tokens": num_tokens,
        "whole": row["whole"],
        "expected_gap_ms": round(1e3 / steps_per_second, 3),
        "itl_ms": row["itl_ms"],
        "events_per_s": round(events / row["wall_s"]),
        "client_us_per_event": round(outcome.cpu_s / events * 1e6, 2),
        "client": row["client"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each client")
    parser.add_argument("--steps-per-second", type=float, default=100.0, help="of the engine")
    arguments = parser.parse_args()
    # The engine's core, not the frontend's.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(
        json.dumps(measure(arguments.clients, arguments.tokens, arguments.steps_per_second)),
        flush=True,
    )


if __name__ == "__main__":
    main()
