"""Streams that drop and count what can't be written, and never raise or wait."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.cluster.processes import log_stream as module
from core.cluster.processes.log_stream import LogStream, LogWriter, print_error, steady_output

ROOT = Path(__file__).parents[4]
LIMIT_S = 10.0
FULL = os.strerror(errno.ENOSPC)


class Disk:
    """Stands in for `os.write`: takes `room` bytes, then is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""

    def write(self, fd: int, data: bytes) -> int:
        taken = data[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, FULL)
        self.room -= len(taken)
        self.written += taken
        return len(taken)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[LogStream, Disk]]]:
    """A stream to a disk with so much room."""
    writers = []

    def make(room: int) -> tuple[LogStream, Disk]:
        disk = Disk(room)
        monkeypatch.setattr(module.os, "write", disk.write)
        writers.append(LogWriter())
        return LogStream(writers[-1], 1), disk

    yield make
    for writer in writers:
        writer.close()


def test_lines_arrive_in_order_and_whole(log: Callable[[int], tuple[LogStream, Disk]]) -> None:
    stream, disk = log(1000)
    print("one", 1, file=stream)
    print("two ", end="", file=stream)
    stream.drain()
    assert disk.written == b"one 1\n"
    print("ü\ud800", file=stream)
    stream.drain()
    assert disk.written == b"one 1\ntwo \xc3\xbc\\ud800\n"
    print("50%", end="\r", file=stream, flush=True)
    stream.drain()
    assert disk.written.endswith(b"50%\r")


def test_a_full_disk_drops_lines_and_tells_once_it_has_room(
    log: Callable[[int], tuple[LogStream, Disk]],
) -> None:
    stream, disk = log(6)
    for text in ("first", "second", "third\nfourth"):
        print(text, file=stream)
        stream.drain()
    assert disk.written == b"first\n"
    assert stream._writer.dropped == 3
    disk.room = 1000
    print("fifth", file=stream)
    print("sixth", file=stream)
    stream.drain()
    assert disk.written.decode() == (
        f"first\n3 lines of this log could not be written: {FULL}\nfifth\nsixth\n"
    )
    assert stream._writer.dropped == 3


def test_what_was_lost_is_told_without_another_line(
    log: Callable[[int], tuple[LogStream, Disk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    stream, disk = log(0)
    print("lost", file=stream)
    stream.drain()
    disk.room = 1000
    deadline = time.monotonic() + LIMIT_S
    while not disk.written:
        assert time.monotonic() < deadline
    assert disk.written.decode() == f"1 line of this log could not be written: {FULL}\n"


def test_what_was_lost_is_told_at_the_end(log: Callable[[int], tuple[LogStream, Disk]]) -> None:
    stream, disk = log(0)
    print("lost", file=stream)
    stream.drain()
    disk.room = 1000
    stream._writer.close()
    assert disk.written.decode() == f"1 line of this log could not be written: {FULL}\n"


@pytest.mark.parametrize("room", range(3, 80))
def test_a_disk_that_fills_up_anywhere(
    log: Callable[[int], tuple[LogStream, Disk]], room: int
) -> None:
    """Also within a line, and within the line that tells of those before."""
    stream, disk = log(3)
    lines = ["aaaa", "bbbb", "cccc", "dddd", "eeee"]
    for number, text in enumerate(lines):
        if number == 2:
            disk.room = room
        print(text, file=stream)
        stream.drain()
    disk.room = 1000
    print("end", file=stream)
    stream.drain()
    whole = [line for line in disk.written.decode().split("\n") if line in lines]
    # A line of which all but its end was written counts as dropped, and can be read.
    assert stream._writer.dropped - (len(lines) - len(whole)) in (0, 1)
    told = [line for line in disk.written.decode().split("\n") if line.endswith(FULL)]
    assert sum(int(line.split()[0]) for line in told) >= len(lines) - len(whole)
    assert disk.written.endswith(b"\nend\n")


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    read_fd, write_fd = os.pipe()
    writer = LogWriter()
    stream = LogStream(writer, write_fd)
    line = "x" * 1023
    for _ in range(3000):  # 3 MiB, where a pipe takes 64 KiB and the queue 1 MiB
        print(line, file=stream)
    assert 1800 < writer.dropped < 2000
    found = b""
    while found.count(line.encode() + b"\n") < 3000 - writer.dropped:
        found += os.read(read_fd, 1 << 20)
    print("last", file=stream)
    while not found.endswith(b"last\n"):
        found += os.read(read_fd, 1 << 20)
    lost = r"(\d+) lines? of this log could not be written: nobody reads"
    told = re.findall(lost, found.decode())
    assert sum(map(int, told)) == writer.dropped
    writer.close()
    os.close(read_fd)
    os.close(write_fd)


def test_who_wants_to_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    told: list[int] = []
    writer = LogWriter(lambda total: told.append(os.write(write_fd, b"x") and total))
    with open("/dev/full", "wb") as full:
        LogStream(writer, full.fileno()).write("a\nb\n")
        os.read(read_fd, 1)
        writer.close()
    assert told == [2]
    os.close(read_fd)
    os.close(write_fd)


RUN = """
import sys
from core.cluster.processes.log_stream import steady_output
with steady_output() as log:
    for number in range(100):
        print("out", number)
        print("err", number, file=sys.stderr, flush=True)
sys.exit(log.dropped)
"""


@pytest.mark.parametrize(
    ("redirections", "status"),
    [("> /dev/full 2> /dev/full", 200), ("> /dev/full", 100), ("2>&-", 0), (">&- 2>&- <&-", 0)],
)
def test_a_process_keeps_its_exit_status(redirections: str, status: int) -> None:
    command = f'exec "$0" -c "$1" {redirections}'
    process = subprocess.run(["sh", "-c", command, sys.executable, RUN], cwd=ROOT)
    assert process.returncode == status


def test_an_error_to_a_full_disk_keeps_the_exit_status() -> None:
    code = f"import sys; from {module.__name__} import print_error; print_error('x'); sys.exit(2)"
    process = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2> /dev/full', sys.executable, code], cwd=ROOT
    )
    assert process.returncode == 2


def test_streams_without_a_descriptor_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with steady_output():
        print("here")
        print_error("there")
    assert capsys.readouterr() == ("here\n", "there\n")
