"""Shapes of linear layers, and the launches that `benchmarks.gpu_linear` tries for them."""

from collections.abc import Iterator
from typing import Any

Tile = dict[str, Any]
# name: (operation, rows of the weight, inputs, how many of them a step of Llama-3.1-8B has)
SHAPES = {
    "8b_qkv": ("linear", 6144, 4096, 32),
    "8b_out": ("linear", 4096, 4096, 32),
    "8b_gate_up": ("gated_linear", 28672, 4096, 32),
    "8b_down": ("linear", 4096, 14336, 32),
    "8b_head": ("logits", 128256, 4096, 1),
    # A rank's parts over two.
    "8b_tp2_qkv": ("linear", 3072, 4096, 0),
    "8b_tp2_out": ("linear", 4096, 2048, 0),
    "8b_tp2_gate_up": ("gated_linear", 14336, 4096, 0),
    "8b_tp2_down": ("linear", 4096, 7168, 0),
    "8b_tp2_head": ("logits", 64128, 4096, 0),
    "30b_tp2_qkv": ("linear", 2560, 2048, 0),
    "30b_tp2_out": ("linear", 2048, 2048, 0),
    "30b_tp2_head": ("logits", 75968, 2048, 0),
    "30b_qkv": ("linear", 5120, 2048, 0),
    "30b_out": ("linear", 2048, 4096, 0),
    "30b_head": ("logits", 151936, 2048, 0),
    "30b_gate": ("gate", 128, 2048, 0),
    "dsv3_gate": ("gate", 256, 7168, 0),
}


def vectors(size_I: int, rows: int) -> Iterator[Tile]:
    """Tiles of 16 to 64 registers a thread."""
    widths = [width for width in (1024, 2048, 4096, 16384) if width < 1.2 * size_I]
    for block_I in widths if rows == 1 else widths[-2:]:
        for block_O in (1, 2, 4, 8):
            for num_warps in (2, 4, 8):
                registers = block_O * block_I // (64 * num_warps)
                if 16 <= registers <= (64 if rows == 1 else 32):
                    yield {
                        "path": "vector",
                        "ROWS": rows,
                        "BLOCK_O": block_O,
                        "BLOCK_I": block_I,
                        "num_warps": num_warps,
                    }


# (rows of a tile, outputs, inputs, warps, stages, programs that share a sum)
_MATRICES: dict[int, list[tuple[int, ...]]] = {
    16: [
        (16, 16, 256, 4, 6, 1),
        (16, 32, 128, 4, 8, 1),
        (16, 32, 256, 4, 5, 1),
        (16, 32, 512, 8, 4, 1),
        (16, 64, 128, 4, 6, 1),
        (16, 64, 256, 4, 4, 1),
        (16, 64, 256, 8, 5, 1),
        (16, 16, 256, 4, 5, 2),
        (16, 32, 128, 4, 6, 2),
        (16, 32, 256, 4, 4, 2),
        (16, 32, 256, 4, 4, 4),
        (16, 64, 256, 4, 4, 2),
    ],
    32: [
        (32, 32, 256, 4, 5, 1),
        (32, 32, 128, 4, 6, 1),
        (32, 64, 128, 4, 5, 1),
        (32, 64, 256, 4, 4, 1),
        (32, 64, 256, 4, 4, 2),
        (32, 128, 128, 8, 4, 1),
    ],
    64: [
        (64, 32, 256, 4, 4, 1),
        (64, 32, 128, 4, 6, 1),
        (64, 64, 128, 4, 5, 1),
        (64, 64, 128, 4, 5, 2),
        (64, 64, 256, 4, 3, 1),
        (64, 16, 256, 4, 3, 2),
        (64, 32, 128, 4, 5, 2),
        (64, 32, 128, 4, 5, 4),
        (64, 32, 256, 4, 3, 2),
        (64, 128, 64, 4, 6, 1),
        (64, 128, 128, 4, 4, 1),
    ],
    128: [(128, 64, 128, 8, 4, 1), (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 4, 2)],
    256: [(128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 4, 1)],
}
# The same for a router's few outputs: many programs share a sum.
_GATES: dict[int, list[tuple[int, ...]]] = {
    16: [
        (16, 16, 256, 4, 4, 7),
        (16, 16, 256, 4, 4, 8),
        (16, 16, 128, 4, 5, 8),
        (16, 32, 256, 4, 4, 14),
    ],
    32: [
        (16, 16, 128, 4, 5, 8),
        (32, 16, 128, 4, 5, 8),
        (32, 32, 128, 4, 5, 14),
        (32, 32, 256, 4, 4, 14),
    ],
    64: [
        (16, 16, 128, 4, 5, 8),
        (32, 16, 128, 4, 5, 8),
        (32, 32, 128, 4, 5, 8),
        (64, 16, 128, 4, 4, 8),
        (64, 16, 256, 4, 3, 4),
        (64, 32, 128, 4, 4, 4),
        (64, 32, 128, 4, 4, 8),
        (64, 32, 128, 4, 4, 14),
    ],
    128: [(64, 32, 128, 4, 4, 8), (64, 64, 128, 4, 4, 14), (128, 32, 128, 4, 4, 14)],
    256: [(64, 64, 128, 4, 4, 8), (128, 64, 128, 8, 4, 14)],
}


def matrices(rows: int, tiles: dict[int, list[tuple[int, ...]]]) -> Iterator[Tile]:
    names = ("BLOCK_T", "BLOCK_O", "BLOCK_I", "num_warps", "num_stages", "SPLIT")
    for values in tiles.get(max(16, rows), ()):
        for prefetched in (0, 512, 1024) if rows <= 64 else (0,):
            tile = dict(zip(names, values, strict=True))
            yield {"path": "matrix", **tile, "PREFETCH_I": prefetched}


# (rows of a tile, outputs, inputs, warps, stages), for more than 64 rows
_WIDES = [
    (128, 128, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (256, 64, 64, 8, 4),
]


def wides() -> Iterator[Tile]:
    names = ("BLOCK_T", "BLOCK_O", "BLOCK_I", "num_warps", "num_stages")
    for values in _WIDES:
        yield {"path": "wide", **dict(zip(names, values, strict=True))}


def candidates(operation: str, size_I: int, rows: int) -> list[Tile]:
    found = [] if rows > 8 else list(vectors(size_I, rows))
    if rows > 1:
        found += matrices(rows, _GATES if operation == "gate" else _MATRICES)
    if rows > 64 and operation != "gate":
        found += wides()
    least = 2 if operation == "gated_linear" else 1
    found = [tile for tile in found if tile["BLOCK_O"] >= least]
    if rows >= 1024 and operation == "gated_linear":
        found.append({"path": "gluon"})
    return [{**tile, "max_rows": rows} for tile in found]
