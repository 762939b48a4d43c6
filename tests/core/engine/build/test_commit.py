"""The memory of a pool is taken ahead, without touching what it holds or what others need."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from core.devices.cpu.host_memory import available_bytes, populate
from core.engine.build.commit import KEPT_FREE_BYTES, PIECE_BYTES, commit, commit_in_background

MIB = 1024**2


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that holds a large tensor alone, or beside another that is in use."""
    wanted, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            found = start <= wanted < stop
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("there is no such mapping")


def can_populate() -> bool:
    probe = torch.empty(MIB, dtype=torch.uint8)
    return populate(probe.data_ptr(), probe.nbytes)


needs_populate = pytest.mark.skipif(
    sys.platform != "linux" or not can_populate(), reason="the kernel can't"
)


@needs_populate
def test_all_of_a_pool_is_taken_and_what_it_holds_stays() -> None:
    # Fresh from the system: torch's own may be what an engine of another test has touched and kept.
    pool = torch.frombuffer(mmap.mmap(-1, 67 * MIB + 123), dtype=torch.uint8)
    pool[::MIB] = 7
    before = resident_bytes(pool)
    assert commit(pool.untyped_storage(), lambda: 1 << 40) == pool.nbytes
    assert resident_bytes(pool) - before > 60 * MIB
    assert bool((pool[::MIB] == 7).all())


@needs_populate
def test_others_keep_their_share() -> None:
    pool = torch.empty(8 * PIECE_BYTES, dtype=torch.uint8)
    left = [KEPT_FREE_BYTES + 3 * PIECE_BYTES]

    def available() -> int:
        left[0] -= PIECE_BYTES
        return left[0] + PIECE_BYTES

    assert commit(pool.untyped_storage(), available) == 3 * PIECE_BYTES


@needs_populate
def test_it_is_done_beside_the_work() -> None:
    pool = torch.empty(4 * MIB, dtype=torch.uint8)
    thread = commit_in_background(pool.untyped_storage())
    thread.join(20)
    assert not thread.is_alive()


def test_what_is_available_is_a_number() -> None:
    assert 0 < available_bytes() < 1 << 50
