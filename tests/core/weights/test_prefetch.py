"""Reading ahead: in order, several at once, bounded, and no different from reading when asked."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import Shard
from core.weights.manifest import TensorRequest
from core.weights.prefetch import Prefetcher


def take(name: str, values: int = 10) -> TensorRequest:
    return TensorRequest(name, (values,), None, torch.float32)


class Recorder:
    """A load that notes what it is asked for."""

    def __init__(self, then: Callable[[TensorRequest], None] = lambda take: None) -> None:
        self.names: list[str] = []
        self.threads: set[int] = set()
        self._then = then

    def __call__(self, take: TensorRequest) -> Tensor:
        self.names.append(take.name)
        self.threads.add(threading.get_ident())
        self._then(take)
        return torch.full((1,), float(take.name))


def value(part: object) -> float:
    assert isinstance(part, Tensor)
    return part.item()


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=12),
    asked=st.lists(st.integers(0, 15), max_size=30),
    ahead=st.integers(0, 400),
    num_threads=st.integers(1, 3),
)
def test_whatever_is_asked_for_comes_once_each_time(
    sizes: list[int], asked: list[int], ahead: int, num_threads: int
) -> None:
    """Expected or not, in order or not, twice or not at all."""
    takes = [take(str(i), size) for i, size in enumerate(sizes)]
    load = Recorder()
    reader = Prefetcher(takes, load, num_threads=num_threads, max_ahead_bytes=ahead)
    for index in asked:
        wanted = takes[index] if index < len(takes) else take(str(index), 7)
        assert value(reader.get(wanted)) == index
    reader.close()
    for index in range(len(takes)):  # what was asked for once was not read twice
        assert load.names.count(str(index)) <= max(asked.count(index), 1)


def test_no_more_than_the_bound_is_ahead_of_who_asks() -> None:
    takes = [take(str(i), 10) for i in range(20)]  # 40 bytes each
    load = Recorder()
    reader = Prefetcher(takes, load, num_threads=1, max_ahead_bytes=100)
    for index, wanted in enumerate(takes):
        reader.get(wanted)
        assert len(load.names) <= index + 1 + 2
    assert load.names == [wanted.name for wanted in takes]
    assert threading.get_ident() not in load.threads
    reader.close()


def test_nothing_is_read_before_something_is_asked_for() -> None:
    load = Recorder()
    reader = Prefetcher([take("0"), take("1")], load)
    reader.close()
    assert load.names == []


def test_what_nobody_asked_for_is_counted() -> None:
    takes = [take(str(i)) for i in range(5)]
    reader = Prefetcher(takes, Recorder(), max_ahead_bytes=80)
    assert reader.num_left == 5
    for name, left in (("0", 4), ("4", 3), ("9", 3), ("1", 2)):
        reader.get(take(name))
        assert reader.num_left == left
    reader.close()


def test_one_larger_than_the_bound_is_read_alone() -> None:
    takes = [take("0", 1000), take("1", 1000)]
    reader = Prefetcher(takes, Recorder(), max_ahead_bytes=1)
    assert [value(reader.get(wanted)) for wanted in takes] == [0, 1]
    reader.close()


def test_several_are_read_at_once() -> None:
    meeting = threading.Barrier(3)
    takes = [take(str(i)) for i in range(3)]
    reader = Prefetcher(takes, Recorder(lambda _: void(meeting.wait(30))), num_threads=3)
    assert [value(reader.get(wanted)) for wanted in takes] == [0, 1, 2]
    reader.close()


def void(_: object) -> None:
    pass


def test_what_fails_ahead_is_raised_when_it_is_asked_for() -> None:
    def fail(take: TensorRequest) -> None:
        if take.name == "1":
            raise ModelError("tensor 1 is broken")

    takes = [take(str(i)) for i in range(4)]
    reader = Prefetcher(takes, Recorder(fail))
    assert value(reader.get(takes[0])) == 0
    with pytest.raises(ModelError, match="tensor 1 is broken"):
        reader.get(takes[1])
    assert not any("load-weights" in thread.name for thread in threading.enumerate())
    reader.close()


def test_parts_of_one_tensor_are_told_apart() -> None:
    parts = [TensorRequest("0", (4,), Shard(0, index, 2), torch.float32) for index in range(2)]
    load = Recorder()
    reader = Prefetcher([*parts, parts[0]], load)
    for part in (parts[1], parts[0], parts[0]):
        reader.get(part)
    assert len(load.names) == 3
    reader.close()


@pytest.mark.parametrize(("max_ahead", "num_ahead"), [(120, 3), (1, 1)])
def test_as_much_as_may_be_ahead_is_ahead_until_the_end(max_ahead: int, num_ahead: int) -> None:
    """Of 40 bytes each; one at least, however large."""
    begun: SimpleQueue[str] = SimpleQueue()
    load = Recorder(lambda take: begun.put(take.name))
    takes = [take(str(i)) for i in range(9)]
    reader = Prefetcher(takes, load, num_threads=1, max_ahead_bytes=max_ahead)
    names: list[str] = []
    for index, each in enumerate(takes):
        assert value(reader.get(each)) == index
        while len(names) < min(index + 1 + num_ahead, len(takes)):
            names.append(begun.get(timeout=20))
    assert names == [each.name for each in takes]
    assert threading.get_ident() not in load.threads
    reader.close()
