"""Microseconds of one lockstep round between the leaders of DP ranks, each in a process.

    python -m benchmarks.lockstep_round --dp 4 --over tcp

A round is hidden where a step takes longer. With more leaders than cores this measures the
machine's process switching.
"""

import argparse
import json
import multiprocessing
import secrets
import socket
import statistics
import sys
import tempfile
import time

from core.engine.run.links import LeaderLinks, open_links
from core.interfaces.control import Endpoints
from core.interfaces.messages import ScheduledStep
from core.parallel.plan import Plan
from core.wire import Wire

WARM_UP_ROUNDS = 200
# 64 decodes.
PLAN = ScheduledStep(
    1, [], 64, list(range(64)), [500] * 64, [1] * 64, [True] * 64, [], [], []
)  # fmt: skip


def lead(endpoints: Endpoints, dp: int, rank: int, num_rounds: int) -> None:
    """Hold rounds with the others; rank 0 prints how long they took."""
    wire = Wire(endpoints.key)
    plan = Plan(dp=dp, ep=dp)
    links = open_links(wire, endpoints, plan, rank, step_timeout_s=60)
    assert isinstance(links, LeaderLinks)
    links.await_peers(60)
    micros = []
    for _ in range(WARM_UP_ROUNDS + num_rounds):
        start = time.perf_counter()
        links.lockstep.agree(PLAN, busy=True)
        micros.append(1e6 * (time.perf_counter() - start))
    if rank == 0:
        del micros[:WARM_UP_ROUNDS]
        p99 = statistics.quantiles(micros, n=100)[98]
        row = {"dp": dp, "median_us": round(statistics.median(micros)), "p99_us": round(p99)}
        print(json.dumps(row), flush=True)
    wire.close()


def addresses(folder: str, dp: int, over: str) -> Endpoints:
    """Where they meet."""
    if over == "ipc":
        named = [f"ipc://{folder}/{name}" for name in ("engine", "lockstep")]
        return Endpoints(engine=named[0], lockstep=named[1], plans=[""] * dp, store="")
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        ports = [opened.getsockname()[1] for opened in (first, second)]
    named = [f"tcp://127.0.0.1:{port}" for port in ports]
    key = secrets.token_hex(32)
    return Endpoints(engine=named[0], lockstep=named[1], plans=[""] * dp, store="", key=key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--over", choices=("ipc", "tcp"), default="ipc")
    parser.add_argument("--rounds", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        endpoints = addresses(folder, arguments.dp, arguments.over)
        leaders = [
            multiprocessing.Process(
                target=lead, args=(endpoints, arguments.dp, rank, arguments.rounds)
            )
            for rank in range(arguments.dp)
        ]
        for leader in leaders:
            leader.start()
        for leader in leaders:
            leader.join()
    if any(leader.exitcode != 0 for leader in leaders):
        sys.exit(1)


if __name__ == "__main__":
    main()
