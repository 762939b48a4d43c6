"""ZeroMQ sockets between the processes of one engine: made here, secured here.

Every link has a side that stays (ROUTER, binds) and sides that come to it (DEALER, connect, each
with a name of its own). Over TCP all of them speak CURVE: both key pairs are derived from one
secret that the engine's processes share, and who stays lets in only the holder of the other one.
Inside a host (ipc://, in a folder only this user may enter) nothing is encrypted. Messages are
msgpack structs; large ones travel in several frames, so that what libzmq holds of somebody who has
not proved anything yet is small. Knows nothing of what they say.
"""

import hashlib
import threading
import time
from collections.abc import Collection

import msgspec
import zmq
from zmq.utils import z85

from core.errors import ResourceError

Socket = zmq.Socket[bytes]

KEY_BYTES = 32
MAX_FRAME_BYTES = 1 << 20  # libzmq allots that much as soon as anybody announces it
_MAX_PART_BYTES = MAX_FRAME_BYTES - 256  # of a message; encryption adds some
HANDSHAKE_S = 10.0  # for who connects to prove itself; each holds a descriptor until then
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # where libzmq asks whether a client may come in
_ZAP_DOMAIN = b"nodeweave"
_KEEPALIVE_IDLE_S = 30


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of who comes: from now on it can be sent to by its name. And the answer:
    everyone who was waited for is there."""


_HELLO = msgspec.msgpack.encode(Hello())


class Wire:
    """Makes the sockets of one process (or, in tests, one thread).

    `key`: hex of 32 secret bytes, needed for tcp://. A socket belongs to the thread that uses it.
    """

    def __init__(self, key: str = "") -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._sockets: list[Socket] = []
        self._keys = _Keys(key) if key else None
        self._doorkeeper: threading.Thread | None = None

    def bind(self, endpoint: str) -> Socket:
        """The side that stays: a ROUTER. Sending to a name that is not connected raises.

        Raises ResourceError where the address is taken or not this machine's.
        """
        socket = self._socket(zmq.ROUTER, endpoint)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if (keys := self._keys_of(endpoint)) is not None:
            self._keep_the_door(keys)
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ResourceError(f"can't listen at {endpoint}: {error.strerror}") from error
        return socket

    def connect(self, endpoint: str, name: str) -> Socket:
        """A side that comes: a DEALER called `name`, which nobody else at that endpoint is. Returns
        at once; what is sent waits until the other side is there."""
        socket = self._socket(zmq.DEALER, endpoint)
        socket.setsockopt(zmq.ROUTING_ID, name.encode())
        if (keys := self._keys_of(endpoint)) is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(keys.server_secret))
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(keys.client_secret))
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        """Close every socket, dropping what was not sent. By the thread that uses them."""
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()  # ends the doorkeeper
        if self._doorkeeper is not None:
            self._doorkeeper.join()

    def _socket(self, kind: int, endpoint: str) -> Socket:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        # Nothing is dropped and no sender blocks: what is under way is limited by who makes it.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        return socket

    def _keys_of(self, endpoint: str) -> "_Keys | None":
        if not endpoint.startswith("tcp://"):
            return None
        assert self._keys is not None, f"{endpoint} is open to the network and there is no key"
        return self._keys

    def _keep_the_door(self, keys: "_Keys") -> None:
        """Answer libzmq's question who may come in, from before the first socket that asks."""
        if self._doorkeeper is not None:
            return
        socket = self._context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP_ENDPOINT)
        self._doorkeeper = threading.Thread(
            target=_answer_the_door,
            args=(socket, z85.decode(zmq.curve_public(keys.client_secret))),
            name="wire-doorkeeper",
            daemon=True,
        )
        self._doorkeeper.start()


class _Keys:
    """Both sides' secret CURVE keys (Z85), the same in every process that has the secret."""

    def __init__(self, key: str) -> None:
        secret = bytes.fromhex(key)
        assert len(secret) == KEY_BYTES, f"a key has {KEY_BYTES} bytes"
        self.server_secret = self._derive(secret, b"wire server")
        self.client_secret = self._derive(secret, b"wire client")

    @staticmethod
    def _derive(secret: bytes, side: bytes) -> bytes:
        # Any 32 bytes are a Curve25519 secret key.
        derived = hashlib.blake2b(key=secret, person=side, digest_size=KEY_BYTES).digest()
        encoded: bytes = z85.encode(derived)
        return encoded


def _answer_the_door(socket: Socket, client_public: bytes) -> None:
    """ZeroMQ's authentication protocol (rfc.zeromq.org/spec/27): one question a connection."""
    with socket:
        while True:
            try:
                # Version, number, domain, address, identity; then the mechanism and its key.
                question = socket.recv_multipart()
            except zmq.ContextTerminated:
                return
            known = question[5:] == [b"CURVE", client_public]
            status, text = (b"200", b"OK") if known else (b"400", b"unknown key")
            socket.send_multipart([*question[:2], status, text, b"", b""])


def send(socket: Socket, message: bytes, *, to: str | None = None) -> None:
    """Send a message of any size, at once; `to`: by a side that stays, to the name of one that
    came. Raises zmq.ZMQError where nobody has that name."""
    if to is not None:
        socket.send(to.encode(), zmq.SNDMORE)
    if len(message) <= _MAX_PART_BYTES:
        socket.send(message)
        return
    view = memoryview(message)
    socket.send_multipart(
        [view[i : i + _MAX_PART_BYTES] for i in range(0, len(message), _MAX_PART_BYTES)]
    )


def receive(socket: Socket, flags: int = 0) -> bytes:
    """The next message to a side that came. With zmq.NOBLOCK raises zmq.Again where there is
    none."""
    frames = socket.recv_multipart(flags)
    return frames[0] if len(frames) == 1 else b"".join(frames)


def receive_from(socket: Socket, flags: int = 0) -> tuple[str, bytes]:
    """The next message to a side that stays, after the name of who sent it."""
    name, *frames = socket.recv_multipart(flags)
    return name.decode(), frames[0] if len(frames) == 1 else b"".join(frames)


def say_hello(socket: Socket) -> None:
    """Of a connecting side, once, before anything else; `await_answer` later."""
    send(socket, _HELLO)


def await_answer(socket: Socket, *, timeout_s: float, whose: str) -> None:
    """Wait until the bound side has heard from everyone it waits for.

    Raises ResourceError after `timeout_s`; `whose` says who did not answer.
    """
    if not socket.poll(int(timeout_s * 1000)):
        raise ResourceError(
            f"{whose} at {_address(socket)} did not answer within {timeout_s:g} s; look above for "
            "what stopped or delayed it"
        )
    msgspec.msgpack.decode(receive(socket), type=Hello)


def await_hellos(socket: Socket, names: Collection[str], *, timeout_s: float, whose: str) -> None:
    """Wait at a bound socket until each of `names` said hello, and answer them.

    Raises ResourceError naming those that did not within `timeout_s`; `whose` says what they are.
    """
    deadline = time.monotonic() + timeout_s
    missing = set(names)
    while missing:
        left_ms = max(int((deadline - time.monotonic()) * 1000), 0)
        if not socket.poll(left_ms):
            raise ResourceError(
                f"waited {timeout_s:g} s at {_address(socket)} for {whose} "
                f"{', '.join(sorted(missing))}; look above for what stopped or delayed them"
            )
        name, message = receive_from(socket)
        msgspec.msgpack.decode(message, type=Hello)
        missing.discard(name)
    for expected in names:
        send(socket, _HELLO, to=expected)


def _address(socket: Socket) -> str:
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
