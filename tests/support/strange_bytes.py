"""What a stranger may send to a socket that expects msgpack: random bytes, and broken structures.

for number in range(1000):
    data = strange_message(random.Random(number))
"""

import random
from collections.abc import Callable

import msgspec

_LEAVES = [
    b"\xc0", b"\xc1", b"\xc2", b"\x7f", b"\xff", b"\xa0", b"\xa1\xff", b"\xa3abc", b"\xc4\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7,
    b"\xd4\x01\x00", b"\xd6\xff\xff\xff\xff\xff", b"\xc7\x00\xff",
]  # fmt: skip
# Heads that promise far more than follows: strings, arrays, maps, extensions of up to 4 GiB.
_PROMISES = [
    kind + size
    for kind in (b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9")
    for size in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00")
]
_WRAPPERS = [b"\x91", b"\x81\xa1x", b"\x92\xc0", b"\xdc\x00\x01", b"\x81\x91\xc0", b"\xdd\0\0\0\1"]


def strange_message(choice: random.Random, fields: tuple[str, ...] = ("nonce", "proof")) -> bytes:
    """The bytes of one message. `fields`: of the structs that are expected, to come close."""
    makers: list[Callable[[random.Random, tuple[str, ...]], bytes]] = [
        _random, _deep, _promise, _nearly, _nearly, _mutated,
    ]  # fmt: skip
    return choice.choice(makers)(choice, fields)


def framed(choice: random.Random, payload: bytes) -> bytes:
    """With a length before it, which now and then is wrong."""
    size = len(payload)
    if choice.random() < 0.15:
        size = choice.choice([0, size - 1, size + 1, 1024, 1025, 1 << 24, (1 << 32) - 1])
    return max(size, 0).to_bytes(4, "big") + payload


def _random(choice: random.Random, fields: tuple[str, ...]) -> bytes:
    return choice.randbytes(choice.choice([0, 1, 7, 64, 500, 1024, 1500]))


def _deep(choice: random.Random, fields: tuple[str, ...]) -> bytes:
    """Arrays in maps in arrays, as deep as some hundred bytes allow."""
    depth = choice.choice([1, 30, 200, 500, 990, 1000, 1017, 2000])
    wrappers = choice.sample(_WRAPPERS, choice.randint(1, 2))
    inner = b"".join(choice.choice(wrappers) for _ in range(depth)) + choice.choice(_LEAVES)
    return _map(choice, fields, lambda: inner) if choice.random() < 0.7 else inner


def _promise(choice: random.Random, fields: tuple[str, ...]) -> bytes:
    head = choice.choice(_PROMISES) + choice.randbytes(choice.randint(0, 20))
    return _map(choice, fields, lambda: head) if choice.random() < 0.7 else head


def _nearly(choice: random.Random, fields: tuple[str, ...]) -> bytes:
    """The right fields with wrong values, some of them twice, unknown ones among them."""

    def value() -> bytes:
        if choice.random() < 0.5:
            return choice.choice(_LEAVES)
        return msgspec.msgpack.encode(choice.randbytes(choice.choice([0, 1, 31, 32, 33, 200])))

    return _map(choice, fields, value)


def _mutated(choice: random.Random, fields: tuple[str, ...]) -> bytes:
    data = bytearray(_nearly(choice, fields))
    for _ in range(choice.randint(1, 4)):
        data[choice.randrange(len(data))] = choice.randrange(256)
    return bytes(data[: choice.randint(1, len(data))])


def _map(choice: random.Random, fields: tuple[str, ...], value: Callable[[], bytes]) -> bytes:
    names = [choice.choice([*fields, "unknown", "type"]) for _ in range(choice.randint(1, 5))]
    if choice.random() < 0.5:
        names = list(fields)
    body = b"".join(msgspec.msgpack.encode(name) + value() for name in names)
    return bytes([0x80 | len(names)]) + body
