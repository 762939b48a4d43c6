"""How fast one rank loads its part of a checkpoint, and what host memory that takes.

    python -m benchmarks.load_weights [--device cuda] [--folder FOLDER]

Writes checkpoints of random matrices in bfloat16 and in fp8 blocks (deleted afterwards; small ones
stay in the page cache), and takes them whole, by rows and by columns of 4 ranks, as fp8 blocks and
dequantised. Prints one JSON object: GiB/s of the rank's part, and MiB of peak host memory beyond
what the rank keeps there; "safetensors" is the library's own load of the whole file, on a GPU.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from core.interfaces.weights import Shard, WeightReader
from core.weights.reader import CheckpointReader, ShapeReader
from plugins.checkpoints._safetensors.source import SafetensorsSource

ROWS, COLUMNS = 4096, 8192
GIB, MIB = 1 << 30, 1 << 20
RANKS = 4
Build = Callable[[WeightReader], list[object]]


def write(path: Path, num: int, fp8: bool) -> None:
    tensors = {}
    for index in range(num):
        item_bytes = 1 if fp8 else 2
        raw = torch.randint(0, 120, (ROWS, item_bytes * COLUMNS), dtype=torch.uint8)  # no NaN
        tensors[f"{index}.weight"] = raw.view(torch.float8_e4m3fn if fp8 else torch.bfloat16)
        if fp8:
            tensors[f"{index}.weight_scale_inv"] = torch.rand(ROWS // 128, COLUMNS // 128)
    save_file(tensors, path)


def peak_bytes() -> int:
    """Of this process's resident memory, since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def build(num: int, shard: Shard | None, as_blocks: bool) -> Build:
    def work(reader: WeightReader) -> list[object]:
        take = reader.take_blocks if as_blocks else reader.take
        return [take(f"{index}.weight", (ROWS, COLUMNS), shard) for index in range(num)]

    return work


def measured(path: Path, device: torch.device, work: Build) -> dict[str, float]:
    """The better of two."""
    shapes = ShapeReader(torch.bfloat16)
    work(shapes)
    best = float("inf")
    for _ in range(2):
        reset_peak()
        before = peak_bytes()
        start = time.perf_counter()
        reader = CheckpointReader(
            SafetensorsSource([str(path)]),
            torch.bfloat16,
            device,
            lambda *report: None,
            expected=shapes.manifest,
        )
        weights = work(reader)
        reader.finish()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        kept = shapes.num_bytes if device.type == "cpu" else 0
        extra = peak_bytes() - before - kept
        del weights
    return {"gib_per_s": shapes.num_bytes / GIB / best, "extra_host_mib": extra / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--gib", type=float, default=1.0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.zeros(1, device=device)
    result: dict[str, object] = {"device": arguments.device}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for fp8, item_bytes in ((False, 2), (True, 1)):
            path = Path(folder) / f"{fp8}.safetensors"
            num = max(1, int(arguments.gib * GIB / (ROWS * COLUMNS * item_bytes)))
            write(path, num, fp8)
            for name, shard in (
                ("whole", None),
                ("rows", Shard(0, 1, RANKS)),
                ("columns", Shard(1, 1, RANKS)),
            ):
                for as_blocks in (True, False) if fp8 else (False,):
                    kind = ("fp8_as_is" if as_blocks else "fp8_dequantised") if fp8 else "bfloat16"
                    result[f"{kind}_{name}"] = measured(path, device, build(num, shard, as_blocks))
            if not fp8 and device.type == "cuda":
                start = time.perf_counter()
                load_file(path, device=arguments.device)
                result["safetensors"] = {"gib_per_s": arguments.gib / (time.perf_counter() - start)}
            path.unlink()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
