"""An authenticated stream of messages between the parents of two nodes, over TCP.

Both sides prove that they know the cluster's key by answering a fresh challenge, so that nothing
recorded earlier is of use. Each frame carries a MAC under a key of this connection and direction,
over its number and its bytes: none can be forged, changed, repeated, left out or sent back.
Contents are not hidden; they hold no secret. Frames are msgpack structs, bounded in size; nothing
is ever unpickled. Never blocks, starts no thread: `core.cluster.nodes.node_links` waits.

    frame      length (4 bytes, big-endian) | payload | MAC (32 bytes; none in the handshake)
    handshake  server: challenge  ->  client: nonce, proof  ->  server: proof
"""

import contextlib
import hmac
import secrets
import socket
from collections.abc import Callable
from hashlib import blake2b
from typing import TypeVar

import msgspec

from core.cluster.nodes.node_messages import NodeMessage
from core.settings.address import join_address

PROTOCOL = "nodeweave-link/1"
NONCE_BYTES = 32
MAC_BYTES = 32
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_HANDSHAKE_BYTES = 1024  # of a frame of somebody unknown
MAX_UNSENT_BYTES = 64 * 1024 * 1024  # beyond it the other side does not read
_READ_BYTES = 1 << 16
_MAX_REASON_CHARACTERS = 200  # of a decoder's error, which may quote what was sent

T = TypeVar("T")


class LinkError(Exception):
    """The link can't go on; the text says why, without naming the peer."""


class LinkClosed(LinkError):
    """The other side closed it, or the network did."""


class WrongToken(LinkError):
    """The other side has another cluster token."""


class _Challenge(msgspec.Struct, frozen=True):
    protocol: str
    nonce: bytes


class _Answer(msgspec.Struct, frozen=True):
    nonce: bytes
    proof: bytes


class _Welcome(msgspec.Struct, frozen=True):
    proof: bytes  # empty: the answer's proof is wrong


class Link:
    """One side of a connection. Owns the socket. Used from one thread at a time."""

    def __init__(self, connected: socket.socket, key: bytes, *, serves: bool) -> None:
        """`connected` is a TCP socket; `serves` is true at node 0, which accepted it."""
        self._socket = connected
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = _address_text(connected.getpeername)  # host:port
        self.peer_host = _host(connected.getpeername)
        self.own_address = _host(connected.getsockname)
        self._key = key
        self._received = bytearray()
        self._unsent = bytearray()
        self._send_key = self._receive_key = b""
        self._num_sent = self._num_received = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(NodeMessage)
        self.established = False
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._handshake: Callable[[bytes], None] = self._on_challenge
        self._transcript = b""
        if serves:
            self._handshake = self._on_answer
            self._send_handshake(_Challenge(PROTOCOL, self._nonce))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something to send."""
        return bool(self._unsent)

    def send(self, message: NodeMessage) -> None:
        """Queue a message of an established link; `flush` sends it."""
        assert self.established
        payload = self._encoder.encode(message)
        assert len(payload) <= MAX_FRAME_BYTES, len(payload)
        self._unsent += len(payload).to_bytes(4, "big") + payload
        self._unsent += _mac(self._send_key, self._num_sent, payload)
        self._num_sent += 1

    def flush(self) -> bool:
        """Send what the network takes now; whether something is left. Raises LinkError."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > MAX_UNSENT_BYTES:
                raise LinkError("the other side does not read what is sent to it") from None
            return True
        except OSError as error:
            raise LinkClosed(f"the connection broke: {error.strerror}") from error
        return False

    def read(self) -> list[NodeMessage]:
        """Messages that came. Raises LinkError at the end and for anything that is not as it must
        be; messages before that are lost, as the link is then worth nothing."""
        closed: LinkClosed | None = None
        try:
            while (room := self._room()) > 0:
                chunk = self._socket.recv(room)
                if not chunk:
                    closed = LinkClosed("the other side closed the connection")
                    break
                self._received += chunk
        except BlockingIOError:
            pass
        except OSError as error:
            closed = LinkClosed(f"the connection broke: {error.strerror}")
        messages = self._take_frames()
        if closed is not None and not messages:
            raise closed  # else at the next call: what came before the end counts
        return messages

    def end_writing(self) -> None:
        """Let the other side find the end behind what was flushed. It is to be closed once
        `discard` says so: closing while something lies unread resets the connection, and what
        was flushed last may then never be read."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_WR)

    def discard(self) -> bool:
        """Take some of what still comes, unread; whether the other side has ended too."""
        try:
            return not self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection. What was not flushed is dropped."""
        self._socket.close()

    # Frames.

    def _room(self) -> int:
        """Bytes to take at once. Of somebody unknown never more than one frame is held."""
        if not self.established:
            return 4 + MAX_HANDSHAKE_BYTES - len(self._received)
        return min(MAX_FRAME_BYTES + _READ_BYTES - len(self._received), _READ_BYTES)

    def _take_frames(self) -> list[NodeMessage]:
        messages = []
        while len(self._received) >= 4:
            size = int.from_bytes(self._received[:4], "big")
            most, mac_bytes = MAX_FRAME_BYTES, MAC_BYTES
            if not self.established:
                most, mac_bytes = MAX_HANDSHAKE_BYTES, 0
            if size > most:
                raise LinkError(
                    f"it sent a frame of {size} bytes where {most} are allowed; it is no node of "
                    "this engine, or of another version"
                )
            end = 4 + size
            if len(self._received) < end + mac_bytes:
                break
            payload = bytes(self._received[4:end])
            tag = bytes(self._received[end : end + mac_bytes])
            del self._received[: end + mac_bytes]
            if self.established:
                messages.append(self._open(payload, tag))
            else:
                self._handshake(payload)
                if self._send_key:  # established
                    break  # what follows is for whoever reads this link from now on
        return messages

    def _open(self, payload: bytes, tag: bytes) -> NodeMessage:
        if not hmac.compare_digest(tag, _mac(self._receive_key, self._num_received, payload)):
            raise LinkError("it sent a frame that is forged, damaged or out of order")
        self._num_received += 1
        message: NodeMessage = _decoded(self._decoder.decode, payload)
        return message

    def _send_handshake(self, message: msgspec.Struct) -> None:
        payload = self._encoder.encode(message)
        self._unsent += len(payload).to_bytes(4, "big") + payload

    # Handshake, in the order of the steps.

    def _on_challenge(self, payload: bytes) -> None:
        challenge = _decoded(msgspec.msgpack.Decoder(_Challenge).decode, payload)
        if challenge.protocol != PROTOCOL or len(challenge.nonce) != NONCE_BYTES:
            raise LinkError(
                f"it speaks {challenge.protocol[:40]!r}, this node {PROTOCOL!r}; run the same "
                "version of Nodeweave everywhere"
            )
        self._transcript = _transcript(challenge.nonce, self._nonce)
        self._send_handshake(_Answer(self._nonce, self._proof(b"client")))
        self._handshake = self._on_welcome

    def _on_answer(self, payload: bytes) -> None:
        answer = _decoded(msgspec.msgpack.Decoder(_Answer).decode, payload)
        if len(answer.nonce) != NONCE_BYTES:
            raise LinkError("it sent a nonce of the wrong size")
        self._transcript = _transcript(self._nonce, answer.nonce)
        if not hmac.compare_digest(answer.proof, self._proof(b"client")):
            self._send_handshake(_Welcome(b""))
            self.flush()  # so that the other side can say why; a short frame into an empty buffer
            raise WrongToken("it has another cluster token")
        self._send_handshake(_Welcome(self._proof(b"server")))
        self._establish(send=b"server", receive=b"client")

    def _on_welcome(self, payload: bytes) -> None:
        welcome = _decoded(msgspec.msgpack.Decoder(_Welcome).decode, payload)
        if not hmac.compare_digest(welcome.proof, self._proof(b"server")):
            raise WrongToken("it has another cluster token")
        self._establish(send=b"client", receive=b"server")

    def _proof(self, side: bytes) -> bytes:
        return hmac.digest(self._derive(b"proof " + side), self._transcript, "sha256")

    def _establish(self, *, send: bytes, receive: bytes) -> None:
        self._send_key = self._session_key(send)
        self._receive_key = self._session_key(receive)
        self.established = True

    def _session_key(self, sender: bytes) -> bytes:
        return hmac.digest(self._derive(b"frames " + sender), self._transcript, "sha256")

    def _derive(self, purpose: bytes) -> bytes:
        return blake2b(key=self._key, person=purpose, digest_size=MAC_BYTES).digest()


def _transcript(server_nonce: bytes, client_nonce: bytes) -> bytes:
    return PROTOCOL.encode() + server_nonce + client_nonce


def _mac(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + payload, "sha256")


def _decoded(decode: Callable[[bytes], T], payload: bytes) -> T:
    """Whatever a decoder makes of strange bytes (RecursionError of deep ones) is this one error."""
    try:
        return decode(payload)
    except Exception as error:
        reason = str(error)[:_MAX_REASON_CHARACTERS]
        raise LinkError(
            f"it sent what is no message ({reason}); it is no node of this engine, or of another "
            "version"
        ) from error


def _host(name: Callable[[], tuple[str, int]]) -> str:
    try:
        return str(name()[0])
    except OSError:  # the other side is gone already
        return "unknown"


def _address_text(name: Callable[[], tuple[str, int]]) -> str:
    try:
        host, port, *_ = name()
        return join_address(host, port)
    except OSError:
        return "an address that is gone"
