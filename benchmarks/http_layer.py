"""How many tokens a second the HTTP layer streams: 64 chat clients over a fake engine.

    python -m benchmarks.http_layer [--clients 64] [--tokens 1000] [--repeats 3]

The frontend process is the real one (core.serve.process), pinned to one core; the fake engine
and the clients share another. Every token is one server-sent event with its own text; the
clients count events by their bytes. Two loads: "flood", where the engine steps as fast as the
frontend takes it, so that several tokens of a stream may travel in one write; and "paced", where
the engine steps at a fixed rate and every event is written by itself. Prints JSON.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from core.cluster.processes.boot import FrontendBoot, Served
from core.cluster.processes.channel import STATUS_FD_VARIABLE
from core.interfaces.control import ChildStatus, EngineReady, Failed, ModelFiles, Ready
from core.settings.config import AppConfig, FrontendConfig, ModelConfig
from tests.support.fake_engine import endpoints_in
from tests.support.small_tokenizer import byte_level, write_folder

GOAL_TOKENS_PER_S = 20_000
CPU_TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # of the kernel's count of CPU time


class Stack:
    """Frontend and fake engine as processes."""

    def __init__(self, folder: Path, steps_per_second: float, tokenizer_dir: Path) -> None:
        self._cores = sorted(os.sched_getaffinity(0))
        self.endpoints = endpoints_in(folder)
        self._engine = subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.fake_engine",
                "--endpoint", self.endpoints.engine,
                "--token-ids", ",".join(map(str, whole_tokens())),
                "--steps-per-second", str(steps_per_second),
            ],
            preexec_fn=lambda: os.sched_setaffinity(0, {self._cores[-1]}),
        )  # fmt: skip
        boot = FrontendBoot(
            config=AppConfig(model=ModelConfig(name="fake"), frontend=FrontendConfig(port=0)),
            endpoints=self.endpoints,
            files=ModelFiles(
                hf_config={}, weight_files=[], weight_format="dummy",
                tokenizer_dir=str(tokenizer_dir), eos_ids=[2], default_sampling={},
            ),
            served=Served(
                name="fake", max_model_len=1_000_000, vocab_size=byte_level().get_vocab_size()
            ),
        )  # fmt: skip
        read_fd, write_fd = os.pipe()
        self.frontend = subprocess.Popen(
            [sys.executable, "-m", "core.serve.process"],
            stdin=subprocess.PIPE,
            pass_fds=[write_fd],
            env={**os.environ, STATUS_FD_VARIABLE: str(write_fd)},
            preexec_fn=lambda: os.sched_setaffinity(0, {self._cores[0]}),
        )
        os.close(write_fd)
        assert self.frontend.stdin is not None
        for message in (boot, EngineReady({})):
            self.frontend.stdin.write(msgspec.json.encode(message) + b"\n")
        self.frontend.stdin.flush()
        self.url = self._wait_ready(read_fd)

    def _wait_ready(self, status_fd: int) -> str:
        with os.fdopen(status_fd, "rb") as statuses:
            for line in statuses:
                status = msgspec.json.decode(line, type=ChildStatus)
                if isinstance(status, Failed):
                    raise SystemExit(status.message)
                if isinstance(status, Ready):
                    return str(status.info["url"])
        raise SystemExit("the frontend ended before it was ready")

    def cpu_s(self) -> float:
        """CPU seconds of the frontend so far."""
        fields = Path(f"/proc/{self.frontend.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._engine.kill()
        self.frontend.kill()
        self._engine.wait()
        self.frontend.wait()


def whole_tokens() -> list[int]:
    """Ordinary tokens that are whole characters: each makes one event."""
    backend = byte_level()
    special = backend.get_added_tokens_decoder()
    ids = (i for i in range(backend.get_vocab_size()) if i not in special)
    return [i for i in ids if "\ufffd" not in backend.decode([i])]


def request(num_tokens: int) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": num_tokens,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        f"\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.BufferedProtocol):
    """Counts events by their bytes; reads into one buffer. The cheapest client there can be."""

    def __init__(self, payload: bytes, done: asyncio.Future[None]) -> None:
        self._payload = payload
        self._done = done
        self._buffer = bytearray(256 * 1024)
        self._view = memoryview(self._buffer)
        self._tail = 0  # bytes of an event's mark cut by the end of a read
        self.num_events = 0
        self.num_reads = 0
        self.ended_well = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._payload)  # type: ignore[attr-defined]

    def get_buffer(self, _: int) -> memoryview:
        return self._view[self._tail :]

    def buffer_updated(self, num_bytes: int) -> None:
        end = self._tail + num_bytes
        self.num_events += self._buffer.count(b'"content":"', 0, end)
        self.ended_well = self.ended_well or self._buffer.find(b"[DONE]", 0, end) >= 0
        self.num_reads += 1
        self._tail = min(10, end)  # one less than the mark: it is never counted twice
        self._buffer[: self._tail] = self._buffer[end - self._tail : end]

    def connection_lost(self, _: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


async def run_clients(url: str, num_clients: int, num_tokens: int) -> list[Client]:
    loop = asyncio.get_running_loop()
    host, port = url.removeprefix("http://").split(":")
    payload = request(num_tokens)
    clients, ends = [], []
    for _ in range(num_clients):
        end = loop.create_future()
        _, client = await loop.create_connection(
            lambda end=end: Client(payload, end), host, int(port), family=socket.AF_INET
        )
        clients.append(client)
        ends.append(end)
    await asyncio.gather(*ends)
    return clients


def measure(stack: Stack, num_clients: int, num_tokens: int) -> dict[str, float]:
    import uvloop

    cpu_s, begin = stack.cpu_s(), time.perf_counter()
    clients = uvloop.run(run_clients(stack.url, num_clients, num_tokens))
    seconds, cpu_s = time.perf_counter() - begin, stack.cpu_s() - cpu_s
    # The first event of a stream says the role, with empty content, and is no token.
    events = sum(client.num_events - 1 for client in clients)
    expected = num_clients * num_tokens
    assert all(client.ended_well for client in clients), "a stream ended early"
    assert events == expected, f"{events} events for {expected} tokens"
    return {
        "tokens_per_s": events / seconds,
        "frontend_cpu_share": cpu_s / seconds,
        "tokens_per_cpu_s": events / max(cpu_s, CPU_TICK_S),
        "events_per_read": events / sum(client.num_reads for client in clients),
    }


def run_load(load: str, arguments: argparse.Namespace, tokenizer_dir: Path) -> dict[str, object]:
    steps_per_second = arguments.pace / arguments.clients if load == "paced" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), steps_per_second, tokenizer_dir)
        try:
            measure(stack, arguments.clients, 50)  # warm up
            runs = [
                measure(stack, arguments.clients, arguments.tokens)
                for _ in range(arguments.repeats)
            ]
        finally:
            stack.close()
    speeds = [run["tokens_per_s"] for run in runs]
    return {
        "load": load,
        "clients": arguments.clients,
        "tokens_per_client": arguments.tokens,
        "asked_tokens_per_s": arguments.pace if load == "paced" else None,
        "tokens_per_s_max": round(max(speeds)),
        "tokens_per_s_min": round(min(speeds)),
        "tokens_per_frontend_cpu_s_max": round(max(run["tokens_per_cpu_s"] for run in runs)),
        "events_per_read": round(max(run["events_per_read"] for run in runs), 2),
        "ratio_to_goal": round(max(speeds) / GOAL_TOKENS_PER_S, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="of each client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pace", type=float, default=22_000, help="tokens/s of the paced load")
    parser.add_argument("--loads", nargs="+", default=["flood", "paced"])
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = write_folder(Path(folder))
        for load in arguments.loads:
            print(json.dumps(run_load(load, arguments, tokenizer_dir)), flush=True)


if __name__ == "__main__":
    main()
