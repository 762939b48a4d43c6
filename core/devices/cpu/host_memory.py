"""How the C library keeps the memory that a process frees, and how the kernel gives it.
Knows nothing of tensors.

glibc may give a freed block of some MiB back to the kernel at once, and the next block of that
size is faulted in and zeroed again page by page. Whether it does hangs on how the heap happens to
lie; where it does, RMS norm of 2048 x 576 rows takes 2.8 ms and 2,270 faults instead of 0.7 ms and
none, and a prefill of 2,048 tokens of a 135M model 33,000 faults.
"""

import ctypes
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MADV_POPULATE_WRITE = 23  # of <linux/mman.h>

_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc refuses more: half of its largest heap
_KEPT_BYTES = 512 * 1024 * 1024
_GIVEN_BACK_BYTES = 256 * 1024
CGROUP = Path("/sys/fs/cgroup")  # of this process, as a container shows it


def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks of up to 32 MiB, keeping at most 512 MiB of them.

    Holds for the whole process. Returns whether the C library took it: False, without any
    effect on results, where it is not glibc.
    """
    return _tell_malloc(
        {_M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _M_TRIM_THRESHOLD: _KEPT_BYTES}
    )


def give_back_freed_memory() -> bool:
    """Let this process give freed blocks of 256 KiB and more back to the kernel at once.

    Unless told, glibc takes blocks as large as any that was freed so far (up to 32 MiB) from the
    heap, where a small one behind them keeps them. For processes that hold something large now
    and then, and whose small blocks are no tensors. Holds for the whole process; returns as
    `keep_freed_memory` does.
    """
    return _tell_malloc(
        {
            _M_MMAP_THRESHOLD: _GIVEN_BACK_BYTES,
            _M_TRIM_THRESHOLD: _GIVEN_BACK_BYTES,
            _M_ARENA_MAX: 2,
        }
    )


def _tell_malloc(values: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in values.items())


def populate(address: int, num_bytes: int) -> bool:
    """Have the kernel back the whole pages of a range with memory, leaving what they hold as it is;
    others may read and write there meanwhile. Blocks, without Python's lock.

    False where the kernel can't (before Linux 5.14) or has no memory left for it.
    https://man7.org/linux/man-pages/man2/madvise.2.html
    """
    if not sys.platform.startswith("linux"):
        return False
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop <= start:
        return True
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(madvise(start, stop - start, _MADV_POPULATE_WRITE) == 0)


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process can take without pushing others out, its container's limit
    included. Files that are only cached count as available there too, as the kernel drops them.
    https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        current = (cgroup / "memory.current").read_text()
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # no container, or an older kind of limit
        return available
    if not limit.isdigit():
        return available
    taken = int(current) - int(counts.get("inactive_file", 0))
    return max(0, min(available, int(limit) - taken))
