"""How much memory a rank needs while it loads: its part of the weights, and little else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 1 << 20
NUM_MATRICES, ROWS, COLUMNS = 10, 2048, 3072  # 240 MiB in float32, over two files
# Beyond the rank's part: the threads' buffers, and what Python itself needs. The promise to users
# is 1 GiB; a reader that maps files or holds whole tensors needs 180 MiB here.
EXTRA_BYTES = 40 * MIB

CHILD = """
import re, sys, torch
from core.interfaces.weights import Shard
from core.weights.reader import CheckpointReader, ShapeReader
from plugins.checkpoints._safetensors.source import SafetensorsSource

torch.set_num_threads(4)
dtype, dim, num, rows, columns = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:6])

def build(reader):
    return [
        reader.take(f"layers.{i}.weight", (rows, columns), Shard(dim, 3, 4)) for i in range(num)
    ]

def memory(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1])

torch.ones(1000).bfloat16().float()  # what torch allocates once
shapes = ShapeReader(dtype)
build(shapes)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmHWM")
reader = CheckpointReader(
    SafetensorsSource(sys.argv[6:]), dtype, torch.device("cpu"), lambda *report: None,
    expected=shapes.manifest,
)
weights = build(reader)
reader.finish()
peak = memory("VmHWM") - before
assert all((w == i + 1).all() for i, w in enumerate(weights))
print(peak * 1024, shapes.num_bytes)
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("large")
    found = []
    for first in (0, NUM_MATRICES // 2):
        path = folder / f"{first}.safetensors"
        save_file(
            {
                f"layers.{i}.weight": torch.full((ROWS, COLUMNS), i + 1.0)
                for i in range(first, first + NUM_MATRICES // 2)
            },
            path,
        )
        found.append(path)
    return found


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_ranks_part_and_little_more(
    paths: list[Path], dtype: str, dim: int
) -> None:
    arguments = [dtype, *map(str, (dim, NUM_MATRICES, ROWS, COLUMNS, *paths))]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    peak_bytes, part_bytes = map(int, child.stdout.split())
    item_bytes = 4 if dtype == "float32" else 2
    assert part_bytes == NUM_MATRICES * ROWS * COLUMNS * item_bytes // 4
    assert peak_bytes < part_bytes + EXTRA_BYTES
