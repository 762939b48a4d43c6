"""The store in which ranks of several nodes make their process groups: torch's interface, our wire.

torch's own TCPStore lets in whoever can reach its port, and holds and hands out whatever they say.
Here rank 0 keeps the keys (`StoreHub`), the others ask for them over ZeroMQ with CURVE
(`core.wire`), and who does not hold the run's key is refused before the first message is read.

torch calls `RankStore` from threads of its own too (NCCL watches a key in one) while another call
may be waiting for a key: each takes a socket that no other call is using.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import msgspec
import zmq
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.distributed_c10d import Store

from core.wire import Socket, Wire, receive, receive_from, send

GRACE_S = 10.0  # for an answer to travel, after the time that the hub itself may take
CHECK_S = 30.0  # for the answer whether a key is there
CLOSING_S = 0.5  # between two looks of the hub at whether it should end


class _Ask(msgspec.Struct, frozen=True, kw_only=True):
    number: int = 0  # of the question, on its socket


class _Set(_Ask, frozen=True, kw_only=True, tag="set"):
    key: str
    value: bytes


class _Get(_Ask, frozen=True, kw_only=True, tag="get"):
    keys: list[str]
    wait_s: float  # for all of them to be there


class _Check(_Ask, frozen=True, kw_only=True, tag="check"):
    keys: list[str]


class _Add(_Ask, frozen=True, kw_only=True, tag="add"):
    key: str
    amount: int


class _CompareSet(_Ask, frozen=True, kw_only=True, tag="compare_set"):
    key: str
    expected: bytes
    desired: bytes


class _Delete(_Ask, frozen=True, kw_only=True, tag="delete"):
    key: str


class _Count(_Ask, frozen=True, kw_only=True, tag="count"):
    pass


_Question = _Set | _Get | _Check | _Add | _CompareSet | _Delete | _Count


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    values: list[bytes] = []
    amount: int = 0
    missing: list[str] = []  # keys that were not there in time


_QUESTION = msgspec.msgpack.Decoder(_Question)
_ANSWER = msgspec.msgpack.Decoder(_Answer)
_ENCODER = msgspec.msgpack.Encoder()


class _Waiting(msgspec.Struct, eq=False):
    """A question whose keys are not all there yet."""

    name: str
    question: _Get
    deadline_s: float


class StoreHub:
    """Keeps the keys, in a thread of rank 0. Raises ResourceError where the address is taken."""

    def __init__(self, endpoint: str, key: str) -> None:
        self._wire = Wire(key)
        self._socket = self._wire.bind(endpoint)
        self._values: dict[str, bytes] = {}
        self._waiting: list[_Waiting] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="store-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Forget everything; who asks then gets no answer."""
        self._closing = True
        self._thread.join()
        self._wire.close()

    def _run(self) -> None:
        while not self._closing:
            now_s = time.monotonic()
            self._expire(now_s)
            soonest_s = min((waiting.deadline_s for waiting in self._waiting), default=now_s + 1)
            wait_s = min(max(soonest_s - now_s, 0.0), CLOSING_S)
            if not self._socket.poll(int(wait_s * 1000) + 1):
                continue
            name, message = receive_from(self._socket)
            try:
                question = _QUESTION.decode(message)
            except msgspec.DecodeError:
                continue  # of another version: it gets no answer and says so
            self._hear(name, question)

    def _hear(self, name: str, question: _Question) -> None:
        values = self._values
        number = question.number
        match question:
            case _Get(keys=keys):
                waiting = _Waiting(name, question, time.monotonic() + question.wait_s)
                self._waiting.append(waiting)
                self._release()
                return
            case _Set(key=key, value=value):
                values[key] = value
                answer = _Answer(number=number)
            case _Check(keys=keys):
                answer = _Answer(number=number, amount=int(all(key in values for key in keys)))
            case _Add(key=key):
                total = int(values.get(key, b"0")) + question.amount
                values[key] = str(total).encode()
                answer = _Answer(number=number, amount=total)
            case _CompareSet(key=key, expected=expected, desired=desired):
                if values.get(key, b"") == expected:
                    values[key] = desired
                answer = _Answer(number=number, values=[values.get(key, expected)])
            case _Delete(key=key):
                answer = _Answer(number=number, amount=int(values.pop(key, None) is not None))
            case _Count():
                answer = _Answer(number=number, amount=len(values))
        self._tell(name, answer)
        self._release()

    def _release(self) -> None:
        """Answer those whose keys are all there."""
        values = self._values
        for waiting in self._waiting.copy():
            keys = waiting.question.keys
            if all(key in values for key in keys):
                self._waiting.remove(waiting)
                number = waiting.question.number
                self._tell(
                    waiting.name, _Answer(number=number, values=[values[key] for key in keys])
                )

    def _expire(self, now_s: float) -> None:
        for waiting in self._waiting.copy():
            if waiting.deadline_s <= now_s:
                self._waiting.remove(waiting)
                keys = waiting.question.keys
                missing = [key for key in keys if key not in self._values]
                self._tell(waiting.name, _Answer(number=waiting.question.number, missing=missing))

    def _tell(self, name: str, answer: _Answer) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it went away meanwhile
            send(self._socket, _ENCODER.encode(answer), to=name)


class RankStore(Store):
    """One rank's view of it. For any thread. Keep a reference as long as a group is used: torch
    holds the C++ half only.

    Raises what torch's stores raise: DistStoreError where keys are not there in time,
    DistNetworkError where rank 0 does not answer.
    """

    def __init__(self, endpoint: str, key: str, name: str) -> None:
        """`name`: nobody else's at that endpoint. Waits for nothing."""
        super().__init__()
        self._endpoint = endpoint
        self._name = name
        self._wire = Wire(key)
        self._lock = threading.Lock()  # guards what follows
        self._free: list[Socket] = []
        self._num_sockets = 0
        self._number = 0

    def close(self) -> None:
        """No thread may use it any more."""
        self._wire.close()

    # torch.distributed.Store, by the names that Python and C++ call

    def set(self, key: str, value: bytes | str) -> None:
        """Blocks until rank 0 has it, which may start later than this one: for the timeout."""
        self._ask(_Set(key=key, value=_as_bytes(value)))

    def get(self, key: str) -> bytes:
        return self._values([key], self._limit)[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._values(keys, self._limit)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._values(keys, self._limit if timeout is None else timeout)

    def check(self, keys: list[str]) -> bool:
        """Whether all are there; not, where rank 0 does not answer: NCCL asks in a thread in which
        an error would end the process before anybody could say why."""
        try:
            return bool(self._ask(_Check(keys=keys), CHECK_S).amount)
        except DistNetworkError:
            return False

    def add(self, key: str, amount: int) -> int:
        return self._ask(_Add(key=key, amount=amount)).amount

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """The value afterwards. A key that is not there is set where `expected` is empty."""
        question = _CompareSet(key=key, expected=_as_bytes(expected), desired=_as_bytes(desired))
        return self._ask(question).values[0]

    def delete_key(self, key: str) -> bool:
        return bool(self._ask(_Delete(key=key)).amount)

    def num_keys(self) -> int:
        return self._ask(_Count()).amount

    def clone(self) -> "RankStore":
        return self  # threads don't disturb each other here

    deleteKey = delete_key
    getNumKeys = num_keys

    @property
    def _limit(self) -> timedelta:
        """What was last set as timeout, from Python or from C++."""
        limit: timedelta = self.timeout  # type: ignore[attr-defined]  # of the C++ half
        return limit

    def _values(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        wait_s = timeout.total_seconds()
        answer = self._ask(_Get(keys=keys, wait_s=wait_s), wait_s + GRACE_S)
        if answer.missing:
            raise DistStoreError(
                f"not set within {wait_s:g} s by any rank: {', '.join(answer.missing)}"
            )
        return answer.values

    def _ask(self, question: _Question, timeout_s: float | None = None) -> _Answer:
        """`timeout_s`: the store's, unless given."""
        if timeout_s is None:
            timeout_s = self._limit.total_seconds()
        deadline_s = time.monotonic() + timeout_s
        with self._socket() as (socket, number):
            send(socket, _ENCODER.encode(msgspec.structs.replace(question, number=number)))
            while (left_s := deadline_s - time.monotonic()) > 0:
                if socket.poll(int(left_s * 1000) + 1):
                    answer = _ANSWER.decode(receive(socket))
                    if answer.number == number:  # not of a question that was given up
                        return answer
        raise DistNetworkError(f"rank 0 did not answer at {self._endpoint} for {timeout_s:g} s")

    @contextlib.contextmanager
    def _socket(self) -> Iterator[tuple[Socket, int]]:
        """A socket for one question, and the question's number."""
        with self._lock:
            self._number += 1
            number = self._number
            if self._free:
                socket = self._free.pop()
            else:
                self._num_sockets += 1
                socket = self._wire.connect(self._endpoint, f"{self._name}/{self._num_sockets}")
        try:
            yield socket, number
        finally:
            with self._lock:
                self._free.append(socket)


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
