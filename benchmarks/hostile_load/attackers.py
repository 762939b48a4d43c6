"""The process of the attackers: begins attacks at a fixed rate, and counts what became of them.

    python -m benchmarks.hostile_load.attackers < JSON

The JSON is one line: the server, the ports of the engine of two nodes, the number of idle
connections, a factor on all rates. Ends when its standard input does, and then prints the counts.
"""

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.hostile_load.bodies import ONE_REQUEST
from benchmarks.hostile_load.connection import Target, outcome, send_and_read
from benchmarks.hostile_load.held import HELD, idle
from benchmarks.hostile_load.strangers import stranger

MOST_OF_A_KIND = 8  # of one request each, under way at once
STRANGERS_S, MOST_STRANGERS = 0.15, 40


class Attackers:
    """Counts by kind and by what happened."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._choice = random.Random(settings["seed"])
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._under_way: set[asyncio.Task[None]] = set()

    async def attack(self, name: str, made: Awaitable[str]) -> None:
        self.counts[name][await outcome(made)] += 1

    async def every(
        self, name: str, period_s: float, most: int, begin: Callable[[], Awaitable[str]]
    ) -> None:
        """One attack each `period_s` on average, unless `most` are still under way."""
        running: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(period_s / self._settings["rate"] * self._choice.uniform(0.5, 1.5))
            if len(running) >= most:
                self.counts[name]["(put off)"] += 1
                continue
            task = asyncio.ensure_future(self.attack(name, begin()))
            running.add(task)
            task.add_done_callback(running.discard)

    async def stay_idle(self, target: Target) -> None:
        """One connection that does nothing, made again whenever it ends."""
        while True:
            await asyncio.sleep(self._choice.uniform(0, 10))
            await self.attack("idle", idle(target, self._choice))

    async def run(self) -> None:
        """Until the standard input ends."""
        target = Target(**self._settings["target"])
        choice = self._choice
        loops = [
            self.every(
                make.__name__,
                period_s,
                MOST_OF_A_KIND,
                lambda make=make: send_and_read(target, make(choice)),
            )
            for make, period_s in ONE_REQUEST.items()
        ]
        loops += [
            self.every(held.__name__, period_s, most, lambda held=held: held(target, choice))
            for held, (period_s, most) in HELD.items()
        ]
        for name, port in self._settings["ports"]:
            other = Target(target.host, port, "")
            loops.append(
                self.every(
                    f"stranger at {name}",
                    STRANGERS_S * len(self._settings["ports"]),
                    MOST_STRANGERS,
                    lambda other=other: stranger(other, choice),
                )
            )
        loops += [self.stay_idle(target) for _ in range(self._settings["idle"])]
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        await _end_of_input()
        for task in tasks:
            if task.done():
                task.result()  # a fault of this program's
            task.cancel()


async def _end_of_input() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attackers = Attackers(json.loads(sys.stdin.buffer.raw.readline()))
    begin_s = time.monotonic()
    asyncio.run(attackers.run())
    seconds = time.monotonic() - begin_s
    print(
        json.dumps(
            {
                "kinds": {name: dict(attackers.counts[name]) for name in sorted(attackers.counts)},
                "attacks": sum(sum(kind.values()) for kind in attackers.counts.values()),
                "cpu_share": round(time.process_time() / seconds, 3),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
