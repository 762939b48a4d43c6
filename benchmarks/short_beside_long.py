"""Do short requests starve behind long prompts? A server as `make serve` starts it, over HTTP.

    python -m benchmarks.short_beside_long [--turns 2] [key=value ...]

Each turn sends the same load in two ways: many long prompts at once, and short requests that come
one every half second or so. "shared" sends it as clients do, so that the engine shares each step's
prompt tokens; "fcfs" gives every request a priority that grows by arrival, which leaves the engine
no choice but first come, first served. Times to first token of the short ones are compared with
those of an idle server, and all tokens a second of the whole load with each other. Tokens a second
of the server's CPU time tell more where the machine has other things to do. Prompts are random
token ids, so that no cache helps. Further words are keys of the server. Prints JSON lines.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

START_TIMEOUT_S = 300
FIRST_ID, LAST_ID = 1_000, 40_000  # ordinary tokens of SmolLM2
NUM_IDLE = 30  # short requests on an idle server, one after the other
HEALTH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a load."""

    at_s: float  # after the load began
    kind: str
    prompt_tokens: int
    answer_tokens: int
    priority: int = 0


@dataclass(slots=True)
class Answer:
    """What came of one."""

    sent: Sent
    status: int = 0
    retry_after: str = ""
    error: str = ""  # code of an error that came within a stream
    first_s: float = 0.0  # after it was sent
    ended_s: float = 0.0  # after the load began
    tokens: int = 0  # of the answer
    whole: bool = False


@dataclass(slots=True)
class Load:
    """A load and what came of it."""

    answers: list[Answer]
    seconds: float
    cpu_s: float  # of the server's processes
    healths: list[float] = field(default_factory=list)  # seconds that /health took, each 200

    def first_token_s(self, kind: str) -> list[float]:
        """Of the answers that are whole; 0.0 where none is."""
        whole = [answer for answer in self.answers if answer.whole and answer.sent.kind == kind]
        return [answer.first_s for answer in whole] or [0.0]

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        done = [answer for answer in self.answers if answer.whole]
        return sum(answer.sent.prompt_tokens + answer.tokens for answer in done)


@contextmanager
def server(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server that runs meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-m", "core.run", "frontend.port=0", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
    )
    killer = threading.Timer(START_TIMEOUT_S, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            if line.split()[:1] == ["URL"]:
                break
        else:
            raise SystemExit("the server ended before it was ready")
        killer.cancel()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield line.split()[1], process.pid
    finally:
        killer.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def long_and_short(arguments: argparse.Namespace, rng: random.Random) -> list[Sent]:
    """Many long prompts at once, and short ones that come over the time that those take."""
    load = [
        Sent(0.0, "long", arguments.long_tokens, arguments.answer_tokens)
        for _ in range(arguments.longs)
    ]
    at_s = 0.0
    for _ in range(arguments.shorts):
        at_s += arguments.every_s * rng.uniform(0.5, 1.5)
        load.append(Sent(at_s, "short", arguments.short_tokens, arguments.answer_tokens))
    return load


def in_order_of_arrival(load: Sequence[Sent]) -> list[Sent]:
    """The same requests; none may be computed before one that came earlier."""
    return [
        Sent(sent.at_s, sent.kind, sent.prompt_tokens, sent.answer_tokens, priority)
        for priority, sent in enumerate(load)
    ]


def cpu_s(pid: int) -> float:
    """CPU time of a process and those that it started."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(time.user + time.system for time in times)


class Client:
    """Sends loads to a server, each request over a connection of its own."""

    def __init__(self, url: str, pid: int, rng: random.Random) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._pid = pid
        self._rng = rng
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            self._model = json.load(response)["data"][0]["id"]

    def run(self, load: Sequence[Sent]) -> Load:
        return asyncio.run(self._run(load))

    async def _run(self, load: Sequence[Sent]) -> Load:
        payloads = [self._payload(sent) for sent in load]
        begin, begin_cpu_s = time.perf_counter(), cpu_s(self._pid)
        healths: list[float] = []
        watching = asyncio.create_task(self._watch(healths))
        answers = await asyncio.gather(
            *(self._ask(sent, payload, begin) for sent, payload in zip(load, payloads, strict=True))
        )
        seconds = time.perf_counter() - begin
        watching.cancel()
        return Load(answers, seconds, cpu_s(self._pid) - begin_cpu_s, healths)

    def _payload(self, sent: Sent) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "prompt": [
                    self._rng.randrange(FIRST_ID, LAST_ID) for _ in range(sent.prompt_tokens)
                ],
                "max_tokens": sent.answer_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "priority": sent.priority,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _ask(self, sent: Sent, payload: bytes, begin: float) -> Answer:
        await asyncio.sleep(max(begin + sent.at_s - time.perf_counter(), 0.0))
        answer = Answer(sent)
        sent_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(payload)
        async for line in reader:
            if line.startswith(b"HTTP/1.1 "):
                answer.status = int(line.split()[1])
            elif line.lower().startswith(b"retry-after:"):
                answer.retry_after = line.split(b":")[1].strip().decode()
            elif line.startswith(b"data: {"):
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    answer.error = event["error"]["code"]
                    continue
                if not answer.first_s:
                    answer.first_s = time.perf_counter() - sent_s
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
            elif line.startswith(b"data: [DONE]"):
                answer.whole = not answer.error
        writer.close()
        answer.ended_s = time.perf_counter() - begin
        return answer

    async def _watch(self, healths: list[float]) -> None:
        """Ask for the server's health all the time."""
        while True:
            begin = time.perf_counter()
            reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            line = await reader.readline()
            writer.close()
            assert line.split()[1] == b"200", line
            healths.append(time.perf_counter() - begin)
            await asyncio.sleep(HEALTH_INTERVAL_S)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def row(order: str, load: Load, idle_s: Sequence[float]) -> dict[str, Any]:
    """One load in figures."""
    short, long = load.first_token_s("short"), load.first_token_s("long")
    return {
        "order": order,
        "short_ttft_p50_s": round(statistics.median(short), 3),
        "short_ttft_p99_s": round(percentile(short, 0.99), 3),
        "short_ttft_max_s": round(max(short), 3),
        "short_p99_over_idle_p50": round(percentile(short, 0.99) / statistics.median(idle_s), 1),
        "short_p99_over_idle_p99": round(percentile(short, 0.99) / percentile(idle_s, 0.99), 1),
        "long_ttft_mean_s": round(statistics.mean(long), 1),
        "long_ttft_max_s": round(max(long), 1),
        "seconds": round(load.seconds, 2),
        "tokens_per_s": round(load.tokens / load.seconds, 1),
        "tokens_per_cpu_s": round(load.tokens / load.cpu_s, 1),
        "whole_answers": sum(answer.whole for answer in load.answers),
        "of": len(load.answers),
        "statuses": dict(Counter(answer.status for answer in load.answers)),
        "errors_in_streams": dict(Counter(a.error for a in load.answers if a.error)),
        "refused_without_retry_after": sum(
            answer.status != 200 and not answer.retry_after for answer in load.answers
        ),
        "health_max_s": round(max(load.healths), 3),
    }


def measure(arguments: argparse.Namespace) -> None:
    """Print a line for each load, and at last the medians of all turns."""
    rng = random.Random(arguments.seed)
    rates: dict[str, list[float]] = {}
    with server([f"+model={arguments.model}", *arguments.words]) as (url, pid):
        client = Client(url, pid, rng)
        short = Sent(0.0, "short", arguments.short_tokens, arguments.answer_tokens)
        client.run([short] * 4)
        client.run([Sent(0.0, "long", arguments.long_tokens, arguments.answer_tokens)] * 2)
        idle_s = [client.run([short]).first_token_s("short")[0] for _ in range(NUM_IDLE)]
        idle = {
            "idle_ttft_p50_s": round(statistics.median(idle_s), 4),
            "idle_ttft_p99_s": round(percentile(idle_s, 0.99), 4),
        }
        print(json.dumps(idle), flush=True)
        for turn in range(arguments.turns):
            load = long_and_short(arguments, random.Random(turn))
            orders = [("shared", load), ("fcfs", in_order_of_arrival(load))]
            for order, sent in orders if turn % 2 == 0 else orders[::-1]:
                if order not in arguments.orders:
                    continue
                done = client.run(sent)
                rates.setdefault(order, []).append(done.tokens / done.seconds)
                print(json.dumps(row(order, done, idle_s)), flush=True)
    print(json.dumps({name: round(statistics.median(of), 1) for name, of in rates.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--orders", nargs="+", default=["shared", "fcfs"])
    parser.add_argument("--longs", type=int, default=60)
    parser.add_argument("--long-tokens", type=int, default=1990)
    parser.add_argument("--shorts", type=int, default=60)
    parser.add_argument("--every-s", type=float, default=0.5, help="mean time between short ones")
    parser.add_argument("--short-tokens", type=int, default=20)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments, words = parser.parse_known_args()
    arguments.words = words
    measure(arguments)


if __name__ == "__main__":
    main()
