"""Strangers at the ports of an engine of several nodes: bytes of every kind, no token, no key."""

import asyncio
import random

from benchmarks.hostile_load.connection import Target, connected, end_with_reset
from tests.support.strange_bytes import framed, strange_message

# The greeting of ZMTP 3.1 for CURVE and for NULL: <https://rfc.zeromq.org/spec/37/>.
GREETINGS = [
    b"\xff" + bytes(8) + b"\x7f\x03\x01" + name.ljust(20, b"\0") + bytes(32)
    for name in (b"CURVE", b"NULL", b"PLAIN")
]


def stranger_bytes(choice: random.Random) -> bytes:
    """Of the control link, of ZeroMQ, of torch's store, of HTTP, or of nothing."""
    return choice.choice(
        [
            framed(choice, strange_message(choice)),
            choice.choice(GREETINGS) + strange_message(choice),
            choice.choice(GREETINGS)[: choice.randrange(64)],
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            choice.randbytes(choice.choice([1, 8, 64, 5000])),
            b"\0" * 4096,
            b"\xff" * 4096,
            b"",
        ]
    )


async def stranger(target: Target, choice: random.Random) -> str:
    """Connect, shout, then stay for a while, leave, or end with a reset."""
    async with connected(target) as (reader, writer):
        if choice.random() < 0.3:
            end_with_reset(writer)
        for _ in range(choice.randint(1, 3)):
            writer.write(stranger_bytes(choice))
            await writer.drain()
        try:
            async with asyncio.timeout(choice.choice([0.01, 0.5, 20])):
                while await reader.read(4096):
                    pass
        except TimeoutError:
            return "left"
    return "turned away"
