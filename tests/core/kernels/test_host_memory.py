"""That freed blocks stay with the process once asked for."""

import platform
import subprocess
import sys

import pytest

# Blocks of 20 MiB are mapped one by one and unmapped when freed, unless glibc was told to take
# them from the heap and to leave the heap as large as it got.
CHECK = """
import sys
import torch
from core.kernels.host_memory import keep_freed_memory

def heap_bytes():
    (line,) = [line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return end - start

if sys.argv[1] == "keep":
    assert keep_freed_memory()
blocks = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(10)]
del blocks
print(heap_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_the_heap_keeps_freed_blocks() -> None:
    heap_bytes = {}
    for mode in ("default", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", CHECK, mode],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        heap_bytes[mode] = int(done.stdout)
    assert heap_bytes["default"] < 200 << 20 <= heap_bytes["keep"], heap_bytes
