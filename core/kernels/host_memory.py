"""How the C library keeps the memory that tensors on the CPU free. Knows nothing of tensors.

glibc may give a freed block of some MiB back to the kernel at once, and the next block of that
size is faulted in and zeroed again page by page. Whether it does hangs on how the heap happens to
lie; where it does, RMS norm of 2048 x 576 rows takes 2.8 ms and 2,270 faults instead of 0.7 ms and
none, and a prefill of 2,048 tokens of a 135M model 33,000 faults.
"""

import ctypes
import sys

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc refuses more: half of its largest heap
_KEPT_BYTES = 512 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks of up to 32 MiB, keeping at most 512 MiB of them.

    Holds for the whole process. Returns whether the C library took it: False, without any
    effect on results, where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
            (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        )
    )
