"""Takes the memory of a KV pool on a CPU before requests need it. Knows nothing of pages.

The kernel gives memory when it is first written. Left to that, a worker grows for hours while the
prefix cache fills, every fault costs a step its time, and a machine with too little says so in the
night. So a thread with the lowest priority writes to it beforehand, as long as enough stays free
for everybody else.
"""

import contextlib
import os
import threading
from collections.abc import Callable

from torch import UntypedStorage

from core.devices.cpu.host_memory import available_bytes, populate

PIECE_BYTES = 16 * 1024 * 1024
# That stay available: where they would not, the rest of the pool is taken when it is needed.
KEPT_FREE_BYTES = 2 * 1024**3


def commit_in_background(pool: UntypedStorage) -> threading.Thread:
    """Begin to take the memory of a pool on the CPU; returns the thread, which ends by itself."""
    thread = threading.Thread(
        target=_commit_quietly, args=(pool,), name="nodeweave-commit", daemon=True
    )
    thread.start()
    return thread


def _commit_quietly(pool: UntypedStorage) -> None:
    with contextlib.suppress(OSError):  # on Linux each thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    commit(pool)


def commit(pool: UntypedStorage, available: Callable[[], int] = available_bytes) -> int:
    """Take as much as leaves KEPT_FREE_BYTES available; returns how many bytes were taken."""
    address, num_bytes = pool.data_ptr(), pool.nbytes()
    for start in range(0, num_bytes, PIECE_BYTES):
        size = min(PIECE_BYTES, num_bytes - start)
        if available() - size < KEPT_FREE_BYTES or not populate(address + start, size):
            return start
    return num_bytes
