"""The process of the honest streams: real clients, whose answers are known before the attack.

    python -m benchmarks.hostile_load.honest < JSON lines

The first line says where the server is and how many streams there shall be. It asks every question
once and prints {"ready": true}. A line that says a period's name begins it ("quiet", then
"attack"): from the first on the streams are kept going, and every gap between two tokens is written
down. The end of the input ends all once the running streams are finished, and what was found is
printed.

It is a process of its own so that what attackers do costs it nothing but a share of the cores; how
late its own timers were is told beside the gaps.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

QUESTIONS = [
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
    "Why is the sky blue?",
]
# Long ones too: their prompts are computed among the attackers'.
PARAGRAPH = (
    "A river is a natural stream of fresh water that flows on land or inside caves towards another "
    "body of water at a lower level. Small rivers are called creeks, brooks and rivulets. "
)
MAX_TOKENS = 80
PATIENCE_S = 600.0
NUM_WORST = 12


@dataclass
class Known:
    """What a question is answered with, and where two tokens were nearly equal."""

    question: str
    text: str
    num_tokens: int
    margins: list[tuple[int, float]]  # offset of a token's end in bytes, distance of the two best


@dataclass
class Found:
    """What was measured in one period."""

    gaps_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # this process's own timers
    worst: list[tuple[float, str]] = field(default_factory=list)  # gaps, and when they ended

    def gap(self, seconds: float) -> None:
        """One between two tokens."""
        self.gaps_s.append(seconds)
        if len(self.worst) < NUM_WORST or seconds > self.worst[-1][0]:
            self.worst = sorted([*self.worst, (round(seconds, 2), time.strftime("%H:%M:%S"))])
            self.worst = self.worst[: -NUM_WORST - 1 : -1]

    def row(self) -> dict[str, Any]:
        return {
            "gaps": spread(self.gaps_s),
            "worst_gaps": self.worst,
            "first_token": spread(self.first_token_s),
            "own_timers_late": spread(self.late_s),
        }


def spread(values: list[float]) -> dict[str, float]:
    """Seconds at p50 and p99, and the most."""
    if not values:
        return {"number": 0}
    ordered = sorted(values)
    places = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    number = len(ordered)
    return {"number": number} | {
        name: round(ordered[min(int(part * number), number - 1)], 4)
        for name, part in places.items()
    }


def questions(paragraphs: list[int]) -> list[str]:
    """Each with so many paragraphs before it."""
    return [PARAGRAPH * times + question for question in QUESTIONS for times in paragraphs]


def num_same(one: bytes, other: bytes) -> int:
    """Bytes that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def judged(known: Known, text: str, num_tokens: int, tie: float) -> str:
    """ "exact"; "tied" where the first difference is at two tokens that are equal within `tie`;
    else "wrong"."""
    if (text, num_tokens) == (known.text, known.num_tokens):
        return "exact"
    same = num_same(text.encode(), known.text.encode())
    ends = [end for end, _ in known.margins]
    at = next((index for index, end in enumerate(ends) if end > same), len(ends))
    # Another token may begin with the same characters.
    near = [margin for _, margin in known.margins[max(at - 1, 0) : at + 1]]
    return "tied" if near and min(near) <= tie else "wrong"


class Streams:
    """The clients of one server."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._client = openai.AsyncOpenAI(
            base_url=settings["url"] + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        )
        self._choice = random.Random(settings["seed"])
        self._ends = False
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []  # of what went wrong
        self.found = Found()
        self.periods: dict[str, Found] = {}

    async def ask(self, question: str) -> Known:
        """The whole answer, with the distances of the two best tokens."""
        answer = await self._client.chat.completions.create(
            model=self._settings["model"],
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        (choice,) = answer.choices
        assert choice.logprobs is not None
        assert answer.usage is not None
        end, margins = 0, []
        for entry in choice.logprobs.content or []:
            end += len(entry.bytes or [])
            best, second = entry.top_logprobs[:2]
            margins.append((end, best.logprob - second.logprob))
        text = choice.message.content or ""
        return Known(question, text, answer.usage.completion_tokens, margins)

    async def stream(self, known: Known) -> tuple[str, int]:
        """Text and number of tokens of a whole answer; raises where it is not whole."""
        begin_s = time.perf_counter()
        stream = await self._client.chat.completions.create(
            model=self._settings["model"],
            messages=[{"role": "user", "content": known.question}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, num_tokens, last_s = "", 0, None
        async for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if not piece:
                continue
            now_s = time.perf_counter()
            if last_s is None:
                self.found.first_token_s.append(now_s - begin_s)
            else:
                self.found.gap(now_s - last_s)
            last_s = now_s
            text += piece
        if num_tokens == 0:
            raise ConnectionError("the stream ended without its usage")
        return text, num_tokens

    async def one(self, known: Known) -> None:
        self.counts["begun"] += 1
        try:
            text, num_tokens = await self.stream(known)
        except openai.APIStatusError as error:
            self.counts["refused"] += 1
            self.examples.append(f"{error.status_code}: {error.message}"[:300])
            await asyncio.sleep(1)
            return
        except (openai.APIError, ConnectionError, TimeoutError, OSError) as error:
            self.counts["lost"] += 1
            self.examples.append(f"{type(error).__name__}: {error}"[:300])
            return
        self.counts["finished"] += 1
        verdict = judged(known, text, num_tokens, self._settings["tie"])
        self.counts[verdict] += 1
        if verdict == "wrong":
            self.examples.append(f"{known.text!r} became {text!r}"[:600])

    async def keep_one(self, known: Sequence[Known]) -> None:
        """One stream after the other."""
        while not self._ends:
            await self.one(self._choice.choice(known))
            await asyncio.sleep(self._settings["pause_s"])

    async def watch_own_timers(self) -> None:
        while True:
            begin_s = time.perf_counter()
            await asyncio.sleep(0.02)
            self.found.late_s.append(time.perf_counter() - begin_s - 0.02)

    async def run(self, lines: asyncio.StreamReader) -> None:
        asked = questions(self._settings["paragraphs"])
        known = await asyncio.gather(*(self.ask(question) for question in asked))
        print(json.dumps({"ready": True}), flush=True)
        watch = asyncio.ensure_future(self.watch_own_timers())
        streams: list[asyncio.Task[None]] = []
        while line := await lines.readline():
            self.found = self.periods.setdefault(line.decode().strip(), Found())
            while len(streams) < self._settings["streams"]:
                streams.append(asyncio.ensure_future(self.keep_one(known)))
        self._ends = True
        await asyncio.gather(*streams)
        watch.cancel()


async def amain() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    streams = Streams(json.loads(await reader.readline()))
    begin_s = time.monotonic()
    await streams.run(reader)
    row: dict[str, Any] = {name: found.row() for name, found in streams.periods.items()}
    row["streams"] = dict(streams.counts)
    row["examples"] = streams.examples[:5]
    row["cpu_share"] = round(time.process_time() / (time.monotonic() - begin_s), 3)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    asyncio.run(amain())
