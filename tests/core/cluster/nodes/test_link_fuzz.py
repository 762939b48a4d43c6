"""Strange bytes at the control port and from a false node 0: they end a connection, nothing else.

The same seeds each time. NODEWEAVE_TEST_FUZZ_S=300 goes on with others for so many seconds.
"""

import itertools
import os
import random
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from core.cluster.nodes import link as module
from core.cluster.nodes.link import MAX_HANDSHAKE_BYTES, PROTOCOL, Link, LinkError
from core.cluster.nodes.link_events import Arrived, Received, Turned
from core.cluster.nodes.member import _connect
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.nodes.node_messages import Doing, NodeMessage
from tests.support.strange_bytes import framed, strange_message

KEY = b"k" * 32
FUZZ_S = float(os.environ.get("NODEWEAVE_TEST_FUZZ_S", "0"))
NUM_SEEDS = 3000
DEEP = b"\x82\xa1x" + b"\x91" * 1017 + b"\xc0"  # more levels than an interpreter's stack takes


def seeds(number: int) -> Iterator[int]:
    """At least so many, then more until the time is over."""
    end_s = time.monotonic() + FUZZ_S
    return itertools.takewhile(
        lambda seed: seed < number or time.monotonic() < end_s, itertools.count()
    )


class FakeSocket:
    """The other side of a connection: gives bytes in pieces, then nothing."""

    def __init__(self, data: bytes, piece: int) -> None:
        self.data, self.piece = data, piece
        self.most_asked = 0

    def recv(self, size: int) -> bytes:
        if not self.data:
            raise BlockingIOError
        self.most_asked = max(self.most_asked, size)
        size = min(size, self.piece)
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def send(self, data: bytes) -> int:
        return len(data)

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getsockname = getpeername

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *values: int) -> None: ...


def challenged(choice: random.Random) -> bytes:
    """Whatever a false node 0 begins with: at times the right thing."""
    if choice.random() < 0.5:
        payload = msgspec.msgpack.encode(module._Challenge(PROTOCOL, choice.randbytes(32)))
        return len(payload).to_bytes(4, "big") + payload
    return b""


@pytest.mark.parametrize("serves", [True, False], ids=["stranger", "false node 0"])
def test_strange_bytes_are_a_link_error_and_hold_little_memory(serves: bool) -> None:
    fields = ("nonce", "proof") if serves else ("protocol", "nonce", "proof")
    reasons: list[str] = []
    for seed in seeds(NUM_SEEDS):
        choice = random.Random(seed)
        data = b"" if serves else challenged(choice)
        for _ in range(choice.randint(1, 3)):
            data += framed(choice, strange_message(choice, fields))
        fake = FakeSocket(data, choice.choice([1, 100, 1 << 20]))
        link = Link(fake, KEY, serves=serves)  # type: ignore[arg-type]
        try:
            while fake.data:
                assert link.read() == []
        except LinkError as error:
            reasons.append(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert not link.established
        assert len(link._received) <= 4 + MAX_HANDSHAKE_BYTES
        assert fake.most_asked <= 4 + MAX_HANDSHAKE_BYTES
    assert len(reasons) > NUM_SEEDS / 2
    assert max(map(len, reasons)) < 400


def test_deep_messages_of_a_node_are_a_link_error_too() -> None:
    """It has the token, and another version, or a bug."""
    link = Link(FakeSocket(b"", 1), KEY, serves=True)  # type: ignore[arg-type]
    link.established, link._receive_key = True, KEY
    tag = module._mac(KEY, 0, DEEP)
    fake = FakeSocket(len(DEEP).to_bytes(4, "big") + DEEP + tag, 1 << 20)
    link._socket = fake  # type: ignore[assignment]
    with pytest.raises(LinkError, match="no message"):
        link.read()


@pytest.fixture
def server() -> Iterator[tuple[NodeLinks, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    links = NodeLinks(interval_s=0.05, timeout_s=30, key=KEY)
    links.listen(listener)
    yield links, listener.getsockname()[1]
    links.close()


def test_a_thousand_levels_of_a_stranger_turn_it_away(server: tuple[NodeLinks, int]) -> None:
    links, port = server
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.recv(4096)
        stranger.sendall(framed(random.Random(3), DEEP[:MAX_HANDSHAKE_BYTES]))
        (turned,) = links.wait(10)
    assert isinstance(turned, Turned)
    assert not turned.wrong_token
    _connect("127.0.0.1", port, KEY).close()


def test_a_node_joins_and_speaks_while_strangers_shout(server: tuple[NodeLinks, int]) -> None:
    links, port = server
    joining = NodeLinks(interval_s=0.05, timeout_s=30, key=KEY)
    number = joining.adopt(_connect("127.0.0.1", port, KEY))
    found: list[object] = []
    said: list[NodeMessage] = []
    for seed in seeds(300):
        choice = random.Random(seed)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(framed(choice, strange_message(choice)))
            if choice.random() < 0.3:
                stranger.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )  # it ends with a reset
        if seed % 50 == 0:
            said.append(Doing(str(seed)))
            joining.send(number, said[-1])
        found += links.events()
    late = NodeLinks(interval_s=0.05, timeout_s=30, key=KEY)
    late.send(late.adopt(_connect("127.0.0.1", port, KEY)), Doing("late"))
    while sum(isinstance(event, Received) for event in found) < len(said) + 1:
        events = links.wait(10)
        assert events
        found += events
    received = [event.message for event in found if isinstance(event, Received)]
    assert received == [*said, Doing("late")]
    assert sum(isinstance(event, Arrived) for event in found) == 2
    joining.close()
    late.close()
