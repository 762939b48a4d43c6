"""The thread of the links: arrivals, messages, silence, and strangers."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from core.cluster.nodes import node_links
from core.cluster.nodes import strangers as module
from core.cluster.nodes.link import Link, LinkClosed
from core.cluster.nodes.link_events import (
    Arrived,
    Broken,
    Event,
    Lost,
    Received,
    Turned,
    TurnedMore,
)
from core.cluster.nodes.member import _connect
from core.cluster.nodes.node_links import MAX_TURNED_WAITING, NodeLinks
from core.cluster.nodes.node_messages import Alive, Doing, NodeMessage, Stop

ROOT = Path(__file__).parents[4]
KEY = b"k" * 32
INTERVAL_S, TIMEOUT_S = 0.05, 0.5
Kind = TypeVar("Kind", bound=Event)


class Side:
    """An links and the events it told so far."""

    def __init__(self) -> None:
        self.links = NodeLinks(interval_s=INTERVAL_S, timeout_s=TIMEOUT_S, key=KEY)
        self.seen: list[Event] = []

    def next(self, kind: type[Kind], timeout_s: float = 10.0) -> Kind:
        """The next event of a kind; others stay."""
        deadline = time.monotonic() + timeout_s
        while True:
            for event in self.seen:
                if isinstance(event, kind):
                    self.seen.remove(event)
                    return event
            assert time.monotonic() < deadline, self.seen
            self.seen += self.links.wait(deadline - time.monotonic())


@pytest.fixture
def server() -> Iterator[tuple[Side, int]]:
    """A listening links and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    side = Side()
    side.links.listen(listener)
    yield side, listener.getsockname()[1]
    side.links.close()


@pytest.fixture
def client() -> Iterator[Callable[[int], tuple[Side, int]]]:
    sides = []

    def connect(port: int) -> tuple[Side, int]:
        side = Side()
        sides.append(side)
        return side, side.links.adopt(_connect("127.0.0.1", port, KEY))

    yield connect
    for side in sides:
        side.links.close()


def test_messages_both_ways(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    serving, port = server
    coming, number = client(port)
    arrived = serving.next(Arrived)
    assert arrived.address.startswith("127.0.0.1:")
    coming.links.send(number, Doing("compare"))
    assert serving.next(Received) == Received(arrived.peer, Doing("compare"))
    serving.links.send(arrived.peer, Stop())
    assert coming.next(Received) == Received(number, Stop())


def test_the_descriptor_tells_of_events(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    serving, port = server
    assert serving.links.events() == []
    client(port)
    assert [type(event) for event in serving.links.wait(10)] == [Arrived]
    with pytest.raises(BlockingIOError):
        os.read(serving.links.fd, 1)


def test_what_was_sent_before_close_arrives(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    serving, port = server
    coming, number = client(port)
    for index in range(100):
        coming.links.send(number, Doing("x" * 10_000 + str(index)))
    coming.links.close()
    found = [serving.next(Received).message for _ in range(100)]
    assert found == [Doing("x" * 10_000 + str(index)) for index in range(100)]
    lost = serving.next(Lost)
    assert (lost.reason, lost.silent) == ("the other side closed the connection", False)
    coming.links.send(number, Stop())  # nothing happens


def read_to_the_end(link: Link) -> tuple[list[NodeMessage], str]:
    """Messages of a link but signs of life, and how it ended."""
    found: list[NodeMessage] = []
    while True:
        select.select([link], [], [], 10)
        try:
            found += [message for message in link.read() if not isinstance(message, Alive)]
        except LinkClosed as error:
            return found, str(error)


@pytest.mark.parametrize("ends", ["close", "drop"])
def test_a_peer_that_still_writes_gets_what_was_sent_and_the_end(
    server: tuple[Side, int], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed at once, the connection would be reset under what it did not read yet."""
    monkeypatch.setattr(node_links, "LEAVE_S", 60.0)
    serving, port = server
    link = _connect("127.0.0.1", port, KEY)
    number = serving.next(Arrived).peer
    serving.links.send(number, Doing("the last words"))
    ending = threading.Thread(target=serving.links.close, args=(60.0,))
    if ends == "drop":
        serving.links.drop(number)
    else:
        ending.start()
    ended = "the other side closed the connection"
    assert read_to_the_end(link) == ([Doing("the last words")], ended)
    for _ in range(3):  # a connection that was closed would answer the first with a reset
        link.send(Alive())
        assert not link.flush()
    link.close()
    if ends == "close":
        ending.join(30)
        assert not ending.is_alive()  # it waits for no longer than the peer


def test_an_idle_link_stays(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    serving, port = server
    coming, _ = client(port)
    serving.next(Arrived)
    deadline = time.monotonic() + 3 * TIMEOUT_S
    while time.monotonic() < deadline:  # waits for what must not come
        events = serving.links.wait(deadline - time.monotonic()) + coming.links.events()
        assert events == []


def test_a_blocked_main_thread_silences_nothing(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    """It computes, and gives up Python's lock only as the interpreter makes it."""
    serving, port = server
    coming, _ = client(port)
    serving.next(Arrived)
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while time.monotonic() < deadline:
        sum(range(1000))
    assert serving.links.events() == []
    assert coming.links.events() == []


def test_a_stopped_peer_is_noticed_in_time(server: tuple[Side, int]) -> None:
    serving, port = server
    code = (
        "import sys, signal\n"
        "from core.cluster.nodes.node_links import NodeLinks\n"
        "from core.cluster.nodes.member import _connect\n"
        f"side = NodeLinks(interval_s={INTERVAL_S}, timeout_s=60, key={KEY!r})\n"
        "side.adopt(_connect('127.0.0.1', int(sys.argv[1]), " + repr(KEY) + "))\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(port)], cwd=ROOT)
    try:
        arrived = serving.next(Arrived, timeout_s=30)
        process.send_signal(signal.SIGSTOP)
        begin_s = time.monotonic()
        lost = serving.next(Lost)
        assert lost == Lost(arrived.peer, f"nothing was heard for {TIMEOUT_S:g} s", True)
        assert TIMEOUT_S - INTERVAL_S * 2 <= time.monotonic() - begin_s < TIMEOUT_S + 1
    finally:
        process.kill()
        process.wait()


def test_strangers_are_turned_away_and_peers_stay(
    server: tuple[Side, int],
    client: Callable[[int], tuple[Side, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)
    serving, port = server
    coming, number = client(port)
    serving.next(Arrived)
    with socket.create_connection(("127.0.0.1", port)) as silent:
        assert "did not prove itself within 0.2 s" in serving.next(Turned).reason
        assert silent.recv(4096)  # its challenge
        assert silent.recv(4096) == b""
    with socket.create_connection(("127.0.0.1", port)) as noisy:
        noisy.sendall(b"GET / HTTP/1.1\r\n\r\n")
        turned = serving.next(Turned)
        assert turned.address == "{}:{}".format(*noisy.getsockname())
        assert not turned.wrong_token
    coming.links.send(number, Stop())
    assert serving.next(Received).message == Stop()


def test_many_strangers_leave_room_for_a_peer(
    server: tuple[Side, int],
    client: Callable[[int], tuple[Side, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_STRANGERS", 4)
    serving, port = server
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    client(port)
    serving.next(Arrived)
    assert "too many others" in serving.next(Turned).reason
    for stranger in strangers:
        stranger.close()


def test_a_dropped_peer_gets_its_last_message(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    serving, port = server
    coming, _ = client(port)
    peer = serving.next(Arrived).peer
    serving.links.send(peer, Stop())
    serving.links.drop(peer)
    assert coming.next(Received).message == Stop()
    coming.next(Lost)
    assert serving.links.events() == []


def test_a_bug_in_the_thread_is_told_and_never_a_silent_end(
    server: tuple[Side, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(link: object) -> None:
        raise KeyError("a bug")

    serving, port = server
    monkeypatch.setattr(serving.links, "_read", fail)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"x")
        assert serving.next(Broken).reason == "this node's links failed (KeyError), see above"


def test_refusals_nobody_asked_for_yet_are_counted(server: tuple[Side, int]) -> None:
    serving, port = server
    number = MAX_TURNED_WAITING + 20
    for _ in range(number):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"\xff" * 8)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):  # until it was turned away
                pass
    seen = serving.links.wait(10)
    assert [type(event) for event in seen] == [Turned] * MAX_TURNED_WAITING + [TurnedMore]
    assert seen[-1] == TurnedMore(20)


def test_a_pause_of_the_whole_machine_loses_nobody(
    server: tuple[Side, int], client: Callable[[int], tuple[Side, int]]
) -> None:
    """Both sides wake at the same time, with clocks far ahead of what they heard last."""
    serving, port = server
    coming, number = client(port)
    serving.next(Arrived)
    for side in (serving, coming):
        side.links._clock._last_s -= 60
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:  # waits for what must not come
        events = serving.links.wait(deadline - time.monotonic()) + coming.links.events()
        assert events == []
    coming.links.send(number, Stop())
    assert serving.next(Received).message == Stop()
