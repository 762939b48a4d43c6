"""The links of one node, kept by a thread of its own: handshakes, heartbeats, messages.

Whatever the main thread does (hashing files, starting processes), this one sends a sign of life on
every link several times a second and notices a peer that sends none. Everything that happens is
an event for the main thread. Knows peers by number only, in the order they were heard of.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from core.cluster.nodes.link import Link, LinkError, WrongToken
from core.cluster.nodes.link_events import (
    Arrived,
    Broken,
    Event,
    Lost,
    Received,
    Turned,
    TurnedMore,
)
from core.cluster.nodes.node_messages import Alive, NodeMessage
from core.cluster.nodes.strangers import Strangers
from core.cluster.processes.watch_clock import WatchClock

MAX_TURNED_WAITING = 32  # events about strangers that the main thread did not take yet
ACCEPT_AGAIN_S = 1.0  # after the system could not accept a connection
LEAVE_S = 1.0  # for a peer to end its side, once everything was sent to it

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """A connection as the thread sees it."""

    number: int
    link: Link
    heard_s: float = 0.0  # of the thread's clock: of the last message, or of its arrival
    watched: bool = True  # by the thread, which takes over an adopted one at its next turn
    told: deque[NodeMessage] = field(default_factory=deque)  # not given to the link yet


class NodeLinks:
    """Links and their thread. Methods are for the main thread, and don't block but for `close`."""

    def __init__(self, *, interval_s: float, timeout_s: float, key: bytes) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._key = key
        self._lock = threading.Lock()  # of what both threads use: the next seven
        self._peers: dict[int, _Peer] = {}
        self._arriving: list[socket.socket | _Peer] = []
        self._dropped: set[int] = set()
        self._events: deque[Event] = deque()
        self._num_turned_waiting = self._num_turned_untold = 0
        self._num_peers = 0
        self._close_at_s: float | None = None
        self._wake_read, self._wake_write = _pipe()
        self.fd, self._event_write = _pipe()  # `fd` is readable when there are events
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._next_beat_s = 0.0
        self._strangers = Strangers()
        self._resting: dict[socket.socket, float] = {}  # listeners, and when they go on
        self._leaving: dict[Link, float] = {}  # no peers any more, and when they are closed
        # A turn is at most an interval after the last; one that is later was kept from running.
        self._clock = WatchClock(longest_gap_s=2 * interval_s)
        self._thread = threading.Thread(target=self._run, name="nodeweave-links", daemon=True)
        self._thread.start()

    def listen(self, listener: socket.socket) -> None:
        """Accept peers at a listening socket, which is closed with this object."""
        listener.setblocking(False)
        with self._lock:
            self._arriving.append(listener)
        self._wake()

    def adopt(self, link: Link) -> int:
        """Take over an established link; returns the peer's number (no `Arrived` comes)."""
        assert link.established
        with self._lock:
            number = self._new_number()
            self._peers[number] = peer = _Peer(number, link, watched=False)
            self._arriving.append(peer)
        self._wake()
        return number

    def send(self, peer: int, message: NodeMessage) -> None:
        """Send soon. To a peer that is lost, or after `close`: nothing."""
        with self._lock:
            if self._close_at_s is not None or peer not in self._peers:
                return
            self._peers[peer].told.append(message)
        self._wake()

    def drop(self, peer: int) -> None:
        """Close a link once everything was sent. No `Lost` comes of it."""
        with self._lock:
            self._dropped.add(peer)
        self._wake()

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass
        with self._lock:
            found = list(self._events)
            self._events.clear()
            if self._num_turned_untold:
                found.append(TurnedMore(self._num_turned_untold))
            self._num_turned_waiting = self._num_turned_untold = 0
        return found

    def wait(self, timeout_s: float) -> list[Event]:
        """The same; blocks until there is one, at most `timeout_s`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.fd, selectors.EVENT_READ)
            selector.select(max(timeout_s, 0.0))
        return self.events()

    def close(self, flush_s: float = 1.0) -> None:
        """Send what is left and let the peers end their sides, for at most `flush_s` in all, then
        close every link and end the thread."""
        with self._lock:
            if self._close_at_s is not None:
                return
            self._close_at_s = time.monotonic() + flush_s
        self._wake()
        self._thread.join()
        for fd in (self._wake_read, self._wake_write, self.fd, self._event_write):
            os.close(fd)

    # Everything below runs in the thread.

    def _run(self) -> None:
        try:
            while not self._finished():
                self._turn()
        except Exception as error:  # a bug: without links the engine must not go on
            log.exception("the thread of the node links failed")
            self._say(Broken(f"this node's links failed ({type(error).__name__}), see above"))
        finally:
            for listener in self._resting:
                listener.close()
            for key in list(self._selector.get_map().values()):
                if key.fileobj != self._wake_read:
                    key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _turn(self) -> None:
        self._clock.tick()
        self._take_arriving()
        self._beat()
        for key, events in self._selector.select(self._pause_s()):
            if key.fileobj == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            elif isinstance(key.data, socket.socket):
                self._accept(key.data)
            elif isinstance(key.data, Link) and events & selectors.EVENT_READ:
                self._read(key.data)
        self._clock.tick()
        for link in self._strangers.late():
            self._turn_away(link, self._strangers.late_text)
        for link in [
            link for link, until_s in self._leaving.items() if until_s <= time.monotonic()
        ]:
            self._leave(link)
        self._judge_silence()
        self._flush()

    def _finished(self) -> bool:
        with self._lock:
            if self._close_at_s is None:
                return False
            pending = any(peer.told or not peer.watched for peer in self._peers.values())
        peers = self._watched_peers()
        if not pending and not any(peer.link.unsent for peer in peers):
            for peer in peers:
                self._part(peer)
            peers = []
        busy = pending or peers or self._leaving
        return time.monotonic() >= self._close_at_s or not busy

    def _watched_peers(self) -> list[_Peer]:
        with self._lock:
            return [peer for peer in self._peers.values() if peer.watched]

    def _take_arriving(self) -> None:
        with self._lock:
            arriving, self._arriving = self._arriving, []
        for found in arriving:
            if isinstance(found, _Peer):
                found.watched, found.heard_s = True, self._clock.now_s
                self._selector.register(found.link, selectors.EVENT_READ, found.link)
            else:
                self._selector.register(found, selectors.EVENT_READ, found)
        now = time.monotonic()
        for listener in [found for found, until_s in self._resting.items() if until_s <= now]:
            del self._resting[listener]
            self._selector.register(listener, selectors.EVENT_READ, listener)

    def _pause_s(self) -> float:
        times = [self._next_beat_s, self._strangers.next_late_s, *self._resting.values()]
        return max(min(times) - time.monotonic(), 0.0)

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat_s:
            return
        self._next_beat_s = now + self._interval_s
        with self._lock:
            for peer in self._peers.values():
                peer.told.append(Alive())

    # Strangers. Nothing that one of them does may reach further than its own connection.

    def _accept(self, listener: socket.socket) -> None:
        if (crowded := self._strangers.crowded_out()) is not None:
            self._turn_away(crowded, "too many others came at the same time")
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it left again
            return
        except OSError as error:  # out of descriptors or memory: it stays so for a while
            log.error("can't accept connections of other nodes for now: %s", error)
            self._selector.unregister(listener)
            self._resting[listener] = time.monotonic() + ACCEPT_AGAIN_S
            return
        try:
            link = Link(connected, self._key, serves=True)
        except OSError:  # it left again
            connected.close()
            return
        self._strangers.add(link)
        self._selector.register(link, selectors.EVENT_READ, link)

    def _read(self, link: Link) -> None:
        if link in self._leaving:
            if link.discard():
                self._leave(link)
            return
        peer = self._peer_of(link)
        if peer is not None:
            self._read_peer(peer)
            return
        try:
            link.read()  # the frame that makes it a peer is the last one it takes
        except Exception as error:
            self._turn_away(link, _reason(error), isinstance(error, WrongToken))
            return
        if link.established:
            self._strangers.remove(link)
            with self._lock:
                peer = _Peer(self._new_number(), link, self._clock.now_s)
                self._peers[peer.number] = peer
            self._say(Arrived(peer.number, link.peer))

    def _turn_away(self, link: Link, reason: str, wrong_token: bool = False) -> None:
        self._strangers.remove(link)
        with self._lock:
            told = self._num_turned_waiting < MAX_TURNED_WAITING
            self._num_turned_waiting += told
            self._num_turned_untold += not told
        if told:
            self._say(Turned(link.peer, reason, wrong_token))
        self._close_link(link)

    # Peers.

    def _read_peer(self, peer: _Peer) -> None:
        try:
            messages = peer.link.read()
        except LinkError as error:
            self._lose(peer, str(error), silent=False)
            return
        if messages:
            peer.heard_s = self._clock.now_s
        for message in messages:
            if not isinstance(message, Alive):
                self._say(Received(peer.number, message))

    def _judge_silence(self) -> None:
        for peer in self._watched_peers():
            if self._is_silent(peer):
                # This thread may have been kept from running itself: what came meanwhile counts.
                self._read_peer(peer)
                if self._is_silent(peer) and peer.number in self._peers:
                    self._lose(peer, f"nothing was heard for {self._timeout_s:g} s", silent=True)

    def _is_silent(self, peer: _Peer) -> bool:
        return self._clock.now_s - peer.heard_s >= self._timeout_s

    def _flush(self) -> None:
        for peer in self._watched_peers():
            with self._lock:
                told, peer.told = peer.told, deque()
                dropped = peer.number in self._dropped
            try:
                for message in told:
                    peer.link.send(message)
                waiting = peer.link.flush()
            except LinkError as error:
                self._read_peer(peer)  # its last words may tell more than a broken connection
                if peer.number in self._peers:
                    self._lose(peer, str(error), silent=False)
                continue
            self._watch(peer.link, waiting)
            if dropped and not waiting:
                self._part(peer)
        for link in self._strangers.links():
            try:
                self._watch(link, link.flush())
            except Exception as error:
                self._turn_away(link, _reason(error))

    def _watch(self, link: Link, for_writing: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if for_writing else 0)
        if self._selector.get_key(link).events != events:
            self._selector.modify(link, events, link)

    def _lose(self, peer: _Peer, reason: str, *, silent: bool) -> None:
        with self._lock:
            known = peer.number not in self._dropped
        self._forget(peer)
        if known:
            self._say(Lost(peer.number, reason, silent))

    def _part(self, peer: _Peer) -> None:
        """Everything was sent to it: it closes when it has read that."""
        with self._lock:
            self._peers.pop(peer.number, None)
        peer.link.end_writing()
        self._watch(peer.link, for_writing=False)
        self._leaving[peer.link] = time.monotonic() + LEAVE_S

    def _leave(self, link: Link) -> None:
        del self._leaving[link]
        self._close_link(link)

    def _forget(self, peer: _Peer) -> None:
        with self._lock:
            self._peers.pop(peer.number, None)
        self._close_link(peer.link)

    def _close_link(self, link: Link) -> None:
        self._selector.unregister(link)
        link.close()

    def _peer_of(self, link: Link) -> _Peer | None:
        return next((peer for peer in self._watched_peers() if peer.link is link), None)

    def _new_number(self) -> int:
        self._num_peers += 1
        return self._num_peers - 1

    def _say(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
        with contextlib.suppress(BlockingIOError):  # full: it is readable, which is all it says
            os.write(self._event_write, b"e")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"w")


def _reason(error: Exception) -> str:
    """Why a stranger is turned away; a kind of error that nobody thought of is enough for that."""
    return str(error) if isinstance(error, LinkError) else f"it caused {type(error).__name__}"


def _pipe() -> tuple[int, int]:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    return read_fd, write_fd
