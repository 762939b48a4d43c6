"""Links: two sides that trust each other, and everything an attacker may send."""

import socket
from collections.abc import Iterator

import msgspec
import pytest

from core.cluster.nodes import link as module
from core.cluster.nodes.link import (
    MAX_FRAME_BYTES,
    MAX_HANDSHAKE_BYTES,
    Link,
    LinkClosed,
    LinkError,
    WrongToken,
)
from core.cluster.nodes.node_messages import Alive, Doing, Facts, NodeMessage

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


class Wiretap:
    """Two TCP connections with this test between them: it sees and changes what is sent."""

    def __init__(self, client_key: bytes = KEY, server_key: bytes = KEY) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            self.near_client, _ = listener.accept()
            self.near_server = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        for near in (self.near_client, self.near_server):
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = Link(client, client_key, serves=False)
        self.server = Link(server, server_key, serves=True)
        self.to_server: list[bytes] = []
        self.to_client: list[bytes] = []

    def carry(self) -> tuple[bytes, bytes]:
        """Take what both sides sent since the last time: by the client, by the server."""
        self.client.flush()
        self.server.flush()
        return drain(self.near_client), drain(self.near_server)

    def pass_on(self) -> None:
        """Carry once, both ways, unchanged."""
        from_client, from_server = self.carry()
        self.to_server.append(from_client)
        self.to_client.append(from_server)
        self.near_server.sendall(from_client)
        self.near_client.sendall(from_server)

    def shake_hands(self) -> None:
        for _ in range(3):
            self.pass_on()
            for side in (self.client, self.server):
                assert side.read() == []

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.near_client.close()
        self.near_server.close()


def drain(source: socket.socket) -> bytes:
    """Everything that lies in a socket's buffer; on loopback it is there once it was sent."""
    source.setblocking(False)
    found = b""
    try:
        while chunk := source.recv(1 << 20):
            found += chunk
    except BlockingIOError:
        pass
    source.setblocking(True)
    return found


@pytest.fixture
def tap() -> Iterator[Wiretap]:
    made = Wiretap()
    yield made
    made.close()


def test_messages_arrive_in_order_both_ways(tap: Wiretap) -> None:
    tap.shake_hands()
    assert tap.client.established
    assert tap.server.established
    sent: list[NodeMessage] = [Doing(f"phase {index}") for index in range(20)]
    for message in sent:
        tap.client.send(message)
    tap.server.send(Alive())
    tap.pass_on()
    assert tap.server.read() == sent
    assert tap.client.read() == [Alive()]


def test_frames_may_come_in_any_pieces(tap: Wiretap) -> None:
    tap.shake_hands()
    tap.client.send(Doing("x" * 1000))
    tap.client.send(Alive())
    data, _ = tap.carry()
    found = []
    for byte in data:
        tap.near_server.sendall(bytes([byte]))
        found += tap.server.read()
    assert found == [Doing("x" * 1000), Alive()]


def test_what_came_before_the_end_is_read_first(tap: Wiretap) -> None:
    tap.shake_hands()
    tap.client.send(Alive())
    tap.pass_on()
    tap.near_server.close()
    assert tap.server.read() == [Alive()]
    with pytest.raises(LinkClosed, match="closed the connection"):
        tap.server.read()


def test_both_sides_find_a_wrong_token() -> None:
    tap = Wiretap(client_key=OTHER_KEY)
    tap.pass_on()  # the challenge
    assert tap.client.read() == []
    tap.pass_on()  # the answer
    with pytest.raises(WrongToken):
        tap.server.read()
    tap.near_client.sendall(drain(tap.near_server))  # the refusal, flushed already
    with pytest.raises(WrongToken):
        tap.client.read()
    assert not tap.server.established
    assert not tap.client.established
    tap.close()


def test_a_server_without_the_token_is_found_out() -> None:
    """It lets the client in, as one that wants to be trusted would."""
    tap = Wiretap(server_key=OTHER_KEY)
    tap.pass_on()
    tap.client.read()
    tap.carry()
    forged = msgspec.msgpack.encode(module._Welcome(b"\0" * 32))
    tap.near_client.sendall(len(forged).to_bytes(4, "big") + forged)
    with pytest.raises(WrongToken):
        tap.client.read()
    tap.close()


def test_a_recorded_session_is_worth_nothing_later(tap: Wiretap) -> None:
    tap.shake_hands()
    tap.client.send(Doing("first"))
    tap.pass_on()
    assert tap.server.read() == [Doing("first")]
    later = Wiretap()
    for recorded in tap.to_server:
        later.near_server.sendall(recorded)
    with pytest.raises(WrongToken):
        later.server.read()
    later.close()


@pytest.mark.parametrize(
    "attack", ["repeated", "left out", "swapped", "changed", "sent back", "cut short"]
)
def test_frames_on_the_way_can_t_be_tampered_with(tap: Wiretap, attack: str) -> None:
    tap.shake_hands()
    frames = []
    for index in range(3):
        tap.client.send(Doing(f"phase {index}"))
        frames.append(tap.carry()[0])
    first, second, third = frames
    received = {
        "repeated": first + first,
        "left out": first + third,
        "swapped": second + first,
        "changed": first[:6] + bytes([first[6] ^ 1]) + first[7:],
        "cut short": (int.from_bytes(first[:4], "big") - 1).to_bytes(4, "big") + first[4:],
    }
    victim = tap.client if attack == "sent back" else tap.server
    near = tap.near_client if attack == "sent back" else tap.near_server
    near.sendall(received.get(attack, first))
    with pytest.raises(LinkError, match="forged, damaged or out of order"):
        victim.read()


def test_a_known_peer_s_frame_may_not_be_huge(tap: Wiretap) -> None:
    tap.shake_hands()
    tap.near_server.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(LinkError, match=f"a frame of {MAX_FRAME_BYTES + 1} bytes"):
        tap.server.read()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 64,
        (MAX_HANDSHAKE_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x03\x93\x01\x02",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\xc1",
    ],
)
def test_garbage_of_a_stranger_is_refused(tap: Wiretap, garbage: bytes) -> None:
    tap.near_server.sendall(garbage)
    with pytest.raises(LinkError) as caught:
        tap.server.read()
    assert not isinstance(caught.value, LinkClosed)


def test_a_message_nobody_knows_is_refused(tap: Wiretap, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(msgspec.Struct, tag=True):
        pass

    tap.shake_hands()
    tap.client.send(Unknown())  # type: ignore[arg-type]
    tap.pass_on()
    with pytest.raises(LinkError, match="no message"):
        tap.server.read()


def test_another_version_is_named(tap: Wiretap) -> None:
    tap.carry()
    challenge = msgspec.msgpack.encode(module._Challenge("nodeweave-link/9", b"n" * 32))
    tap.near_client.sendall(len(challenge).to_bytes(4, "big") + challenge)
    with pytest.raises(LinkError, match=r"'nodeweave-link/9', this node 'nodeweave-link/1'"):
        tap.client.read()


def test_a_peer_that_reads_nothing_is_given_up(
    tap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNSENT_BYTES", 1 << 20)
    tap.shake_hands()
    for _ in range(30):
        tap.client.send(Facts({"x": "y" * (1 << 20)}))
    with pytest.raises(LinkError, match="does not read"):
        tap.client.flush()
