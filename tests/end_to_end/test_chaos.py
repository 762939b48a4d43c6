"""200 clients that stream, hang up and abort at random, in rounds; afterwards nothing is left.

The pool is small, so that every page was soon touched. A worker on a CPU keeps freed blocks
(core.kernels.host_memory): memory grows with the largest steps so far, and must then stay as it is.
The C library is told to keep all in one heap; of those that threads have of their own the next one
adds 64 MiB whenever a step first needs it.

The server is a real one, on SmolLM2. The clients end by a deadline, not by a count: a round lasts
until what they last asked for is answered, which takes longer than the chaos itself.
"""

import asyncio
import random
import time

import httpx
import pytest

from tests.support.server import Server, running_server

NUM_CLIENTS = 200
ROUND_SECONDS = 8.0
QUIET_ROUNDS, MOST_ROUNDS = 2, 12  # in a row without growth; of all
GROWTH = 0.01  # that is none
CAPITAL = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 12,
    "temperature": 0,
}


def metrics(server: Server) -> dict[str, float]:
    """The server's gauges and counters that have no label but the model's name."""
    label = '{model_name="smollm2"} '
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    rows = [line.split(label) for line in lines if label in line]
    return {name.removeprefix("nodeweave_"): float(value) for name, value in rows}


def memory_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in server.children().values())


async def one_client(client: httpx.AsyncClient, chooser: random.Random, deadline: float) -> int:
    """Requests until the deadline; returns how many answers came whole."""
    finished = 0
    while time.monotonic() < deadline:
        body = {
            "model": "smollm2",
            "prompt": [chooser.randrange(100, 40000) for _ in range(chooser.randrange(1, 60))],
            "max_tokens": chooser.randrange(1, 24),
            "ignore_eos": True,
            "stream": chooser.random() < 0.7,
            "n": chooser.choice((1, 1, 1, 2)),
        }
        hang_up_after_s = chooser.choice((None, None, 0.05, 0.5, 2.0))
        try:
            async with asyncio.timeout(hang_up_after_s):
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    async for _ in response.aiter_bytes():
                        pass
            finished += 1
        except TimeoutError:
            continue  # leaving the block closed the connection in mid-answer
    return finished


async def all_clients(url: str, seconds: float) -> int:
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        counts = await asyncio.gather(
            *(one_client(client, random.Random(number), deadline) for number in range(NUM_CLIENTS))
        )
    return sum(counts)


def wait_until_idle(server: Server) -> dict[str, float]:
    """The gauges once nothing runs or waits; fails after 30 s."""
    deadline = time.monotonic() + 30
    while True:
        now = metrics(server)
        if (
            now["num_requests_live"]
            == now["num_requests_running"]
            == now["num_requests_waiting"]
            == 0
        ):
            return now
        assert time.monotonic() < deadline, f"requests left behind: {now}"


def rounds_until_memory_stays(server: Server) -> int:
    """How many answers came whole."""
    finished, quiet, before = 0, 0, 0
    for _ in range(MOST_ROUNDS):
        finished += asyncio.run(all_clients(server.url, ROUND_SECONDS))
        gauges = wait_until_idle(server)
        free_or_cached = gauges["kv_cache_pages_free"] + gauges["kv_cache_pages_cached"]
        assert free_or_cached == gauges["kv_cache_pages"]
        now = memory_bytes(server)
        quiet = quiet + 1 if now < before * (1 + GROWTH) else 0
        if quiet == QUIET_ROUNDS:
            return finished
        before = now
    raise AssertionError(f"memory still grows after {MOST_ROUNDS} rounds: {before} bytes")


@pytest.mark.timeout(600)
def test_nothing_is_left_after_rounds_of_chaos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with running_server(
        "+model=smollm2", "engine.kv_cache_tokens=4096", "frontend.max_queued_requests=1000"
    ) as server:
        expected = httpx.post(f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=60).json()
        assert "Paris" in expected["choices"][0]["message"]["content"]
        assert rounds_until_memory_stays(server) > NUM_CLIENTS
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=60).json()
        assert answer["choices"] == expected["choices"]
        assert server.stop() == 0
