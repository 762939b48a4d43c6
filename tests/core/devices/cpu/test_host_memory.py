"""That freed blocks stay with the process once asked for, and how much memory is there to take."""

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core.devices.cpu.host_memory import available_bytes

# Blocks of 20 MiB are mapped one by one and unmapped when freed, unless glibc was told to take
# them from the heap and to leave the heap as large as it got.
CHECK = """
import sys
import torch
from core.devices.cpu.host_memory import keep_freed_memory

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


@pytest.mark.parametrize(
    ("limit", "current", "cached", "expected"),
    [
        ("max", 10, 0, 100),
        ("50", 30, 0, 20),
        ("50", 45, 30, 35),
        ("500", 30, 0, 100),
        ("5", 9, 0, 0),
    ],
)
def test_a_containers_limit_counts_without_files_that_are_only_cached(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    current: int,
    cached: int,
    expected: int,
) -> None:
    class Memory:
        available = 100

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert available_bytes(tmp_path) == 100, "no container"
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{current}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 3\n")
    assert available_bytes(tmp_path) == expected


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


# Blocks as bodies of requests make them, each with a small one behind it that stays.
BODIES = """
import sys
import psutil
from core.devices.cpu.host_memory import give_back_freed_memory

assert "torch" not in sys.modules
if sys.argv[1] == "give back":
    assert give_back_freed_memory()
process = psutil.Process()
bytes(16 << 20)  # freed at once: glibc takes blocks of this size from the heap from now on
before = process.memory_info().rss
bodies, small = [], []
for _ in range(20):
    bodies.append(b"x" * (8 << 20))
    small.append(b"x" * (200 << 10))
held = process.memory_info().rss - before
del bodies
print(held, process.memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_freed_bodies_leave_the_process() -> None:
    left = {}
    for mode in ("default", "give back"):
        command = [sys.executable, "-c", BODIES, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        held, left[mode] = map(int, done.stdout.split())
        assert held >= 150 << 20
    assert left["give back"] < 8 << 20 < 100 << 20 < left["default"], left
