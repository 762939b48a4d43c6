"""200 clients that stream, hang up and abort at random for a minute; afterwards nothing is left.

The pool is small, so that every page was touched before memory is first measured. A worker on a CPU
keeps freed blocks (core.kernels.host_memory): memory counts from the first time that a round of
chaos left it as it was. The C library is told to have one heap: each thread's own grows by 64 MiB
whenever a step first needs that, which can be in any round.

The server is a real one, on SmolLM2. The clients end by a deadline, not by a count: a round goes on
until what they last asked for is answered, which takes longer than it lasted until then.
"""

import asyncio
import random
import time

import httpx
import pytest

from tests.support.server import Server, running_server

NUM_CLIENTS = 200
ROUND_SECONDS, MOST_ROUNDS = 8.0, 12  # of warming up
SECONDS = 45.0
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
            "max_tokens": chooser.randrange(1, 40),
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


def memory_once_settled(server: Server) -> int:
    """Bytes after the first round of chaos that added less than 1% to them."""
    before = 0
    for _ in range(MOST_ROUNDS):
        asyncio.run(all_clients(server.url, ROUND_SECONDS))
        wait_until_idle(server)
        now = memory_bytes(server)
        if now < before * 1.01:
            return now
        before = now
    raise AssertionError(f"memory still grows after {MOST_ROUNDS} rounds: {before} bytes")


@pytest.mark.timeout(600)
def test_nothing_is_left_after_a_minute_of_chaos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with running_server(
        "+model=smollm2", "engine.kv_cache_tokens=4096", "frontend.max_queued_requests=1000"
    ) as server:
        expected = httpx.post(f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=60).json()
        assert "Paris" in expected["choices"][0]["message"]["content"]
        settled_bytes = memory_once_settled(server)
        finished = asyncio.run(all_clients(server.url, SECONDS))
        assert finished > NUM_CLIENTS / 4
        gauges = wait_until_idle(server)
        assert (
            gauges["kv_cache_pages_free"] + gauges["kv_cache_pages_cached"]
            == gauges["kv_cache_pages"]
        )
        assert memory_bytes(server) < settled_bytes * 1.05 + 20e6
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=60).json()
        assert answer["choices"] == expected["choices"]
        assert server.stop() == 0
