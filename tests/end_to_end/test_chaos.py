"""200 clients that stream, hang up and abort at random; afterwards nothing is left.

The pool is small, so that every page was touched before memory is first measured. A worker on a CPU
keeps freed blocks (core.devices.cpu.host_memory): memory counts from the first time that a round of
chaos left it as it was. The C library is told to have one heap: each thread's own grows by 64 MiB
whenever a step first needs that, which can be in any round.

The server is a real one, on SmolLM2. Nothing is measured in seconds, so that a slow machine sees
the same chaos for longer: clients send a number of requests, hang up at once or after some events,
and wait as long as answers take. What hangs is found by the server's own watch over its steps, or
by the limit on the whole test.
"""

import asyncio
import json
import random

import httpx
import pytest

from tests.support.server import Server, running_server

NUM_CLIENTS = 200
MOST_ROUNDS = 12  # of one request a client, before memory counts
REQUESTS = 4  # of a client, after that
MOST_PROMPT_TOKENS, MOST_TOKENS = 40, 12
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


async def one_request(client: httpx.AsyncClient, chooser: random.Random) -> bool:
    """Whether the client hung up. Otherwise the whole answer came, or this raises."""
    body = {
        "model": "smollm2",
        "prompt": [
            chooser.randrange(100, 40000) for _ in range(chooser.randint(1, MOST_PROMPT_TOKENS))
        ],
        "max_tokens": chooser.randint(1, MOST_TOKENS),
        "ignore_eos": True,
        "stream": chooser.random() < 0.7,
        "n": chooser.choice((1, 1, 1, 2)),
    }
    # Requests that are not streamed are answered in one piece, or hung up on before.
    hangs_up_after = chooser.choice((None, None, 0, 1, 4))
    if hangs_up_after == 0:
        return await hang_up_at_once(client, body)
    text, num_chunks = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for chunk in response.aiter_text():
            text, num_chunks = text + chunk, num_chunks + 1
            if body["stream"] and num_chunks == hangs_up_after:
                return True  # leaving the block closes the connection
    assert "[DONE]" in text if body["stream"] else '"finish_reason":"length"' in text, text
    return False


async def hang_up_at_once(client: httpx.AsyncClient, body: dict[str, object]) -> bool:
    """Close the connection as soon as the request was sent."""
    content = json.dumps(body).encode()
    host, port = client.base_url.host, client.base_url.port
    _, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    return True


async def all_clients(url: str, num_requests: int) -> None:
    """So many requests of each client, one after the other."""
    limits = httpx.Limits(max_connections=NUM_CLIENTS)

    async def one_client(chooser: random.Random) -> list[bool]:
        return [await one_request(client, chooser) for _ in range(num_requests)]

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
        hung_up = await asyncio.gather(
            *(one_client(random.Random(number)) for number in range(NUM_CLIENTS))
        )
    assert {True, False} <= {one for each in hung_up for one in each}


def wait_until_idle(server: Server) -> dict[str, float]:
    """The gauges once nothing runs or waits; one that never falls is for the test's limit."""
    while True:
        now = metrics(server)
        if (
            now["num_requests_live"]
            == now["num_requests_running"]
            == now["num_requests_waiting"]
            == 0
        ):
            return now


def memory_once_settled(server: Server) -> int:
    """Bytes after the first round of chaos that added less than 1% to them."""
    before = 0
    for _ in range(MOST_ROUNDS):
        asyncio.run(all_clients(server.url, 1))
        print(f"a round of warming up is over: {before} bytes before it")
        wait_until_idle(server)
        now = memory_bytes(server)
        if now < before * 1.01:
            return now
        before = now
    raise AssertionError(f"memory still grows after {MOST_ROUNDS} rounds: {before} bytes")


@pytest.mark.timeout(3600)
def test_nothing_is_left_after_chaos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with running_server(
        "+model=smollm2",
        "engine.kv_cache_tokens=2048",
        "frontend.max_queued_requests=1000",
    ) as server:
        expected = httpx.post(
            f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=None
        ).json()
        assert "Paris" in expected["choices"][0]["message"]["content"]
        settled_bytes = memory_once_settled(server)
        asyncio.run(all_clients(server.url, REQUESTS))
        gauges = wait_until_idle(server)
        assert (
            gauges["kv_cache_pages_free"] + gauges["kv_cache_pages_cached"]
            == gauges["kv_cache_pages"]
        )
        assert memory_bytes(server) < settled_bytes * 1.05 + 20e6
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CAPITAL, timeout=None).json()
        assert answer["choices"] == expected["choices"]
        assert server.stop() == 0
