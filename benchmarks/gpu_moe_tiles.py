"""Shapes of mixtures of experts, and the tiles that `benchmarks.gpu_moe` tries for them."""

from collections.abc import Iterator
from dataclasses import dataclass

from core.ops.expert_tiles import ProductTile


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's experts, or those of one rank of `ep`: it has all rows, and pairs of other ranks'
    experts among its own."""

    num_experts: int
    hidden: int
    middle: int
    top_k: int
    fp8: bool = False
    ep: int = 1

    @property
    def num_local(self) -> int:
        return self.num_experts // self.ep


SHAPES = {
    "qwen3_30b_a3b": Shape(128, 2048, 768, 8),
    **{f"qwen3_30b_a3b_tp{tp}": Shape(128, 2048, 768 // tp, 8) for tp in (2, 4, 8)},
    **{f"qwen3_30b_a3b_ep{ep}": Shape(128, 2048, 768, 8, ep=ep) for ep in (2, 4, 8)},
    **{f"qwen3_235b_a22b_ep{ep}": Shape(128, 4096, 1536, 8, ep=ep) for ep in (4, 8, 16)},
    "deepseek_v3": Shape(256, 7168, 2048, 8, fp8=True),
    **{f"deepseek_v3_ep{ep}_all": Shape(256, 7168, 2048, 8, fp8=True, ep=ep) for ep in (2, 4, 8)},
    "deepseek_v3_ep16": Shape(16, 7168, 2048, 8, fp8=True),  # a rank's, with all pairs its own
}

# (weight's rows and inputs of a step, warps, stages, swapped, programs of a processor)
_Values = tuple[int, int, int, int, bool, int]
_FEW: dict[bool, list[_Values]] = {
    True: [
        (16, 256, 4, 4, False, 0),
        (32, 128, 4, 4, False, 0),
        (32, 128, 4, 5, False, 0),
        (32, 256, 4, 2, False, 0),
        (32, 256, 4, 2, False, 2),
        (32, 256, 4, 3, False, 0),
        (64, 64, 4, 4, False, 0),
        (64, 128, 4, 2, False, 0),
        (64, 128, 4, 3, False, 0),
        (64, 128, 4, 3, False, 2),
        (64, 128, 4, 3, True, 2),
        (64, 64, 4, 5, True, 2),
        (64, 64, 4, 5, True, 0),
    ],
    False: [
        (32, 128, 4, 6, False, 0),
        (32, 256, 4, 3, False, 0),
        (32, 256, 4, 3, False, 3),
        (32, 256, 4, 4, False, 0),
        (64, 128, 4, 3, False, 0),
        (64, 128, 4, 4, False, 0),
        (64, 256, 4, 2, False, 0),
        (128, 64, 4, 4, False, 2),
        (128, 128, 4, 3, False, 0),
        (64, 128, 4, 5, True, 2),
        (128, 64, 4, 5, True, 2),
        (64, 256, 4, 3, True, 2),
        (128, 128, 8, 3, True, 1),
    ],
}
_MANY: dict[bool, list[_Values]] = {
    True: [
        (64, 64, 4, 4, False, 2),
        (128, 64, 8, 3, False, 1),
        (128, 64, 8, 4, False, 0),
        (64, 64, 8, 4, False, 0),
    ],
    False: [
        (128, 64, 4, 4, False, 2),
        (128, 64, 8, 4, False, 1),
        (256, 64, 8, 3, False, 1),
        (256, 64, 8, 3, False, 0),
        (128, 128, 8, 3, False, 1),
    ],
}

_FEW_FP8: dict[bool, list[_Values]] = {
    True: [
        (128, 128, 4, 3, True, 0),
        (128, 128, 4, 3, True, 2),
        (128, 128, 4, 4, True, 0),
        (128, 128, 8, 4, True, 1),
        (128, 128, 8, 3, True, 0),
    ],
    False: [
        (64, 128, 4, 4, True, 0),
        (64, 128, 4, 6, True, 0),
        (128, 128, 4, 4, True, 0),
        (128, 128, 4, 5, True, 2),
        (128, 128, 8, 5, True, 1),
    ],
}
_MANY_FP8: dict[bool, list[_Values]] = {
    True: [
        (128, 128, 8, 3, False, 0),
        (128, 128, 8, 3, False, 1),
        (128, 128, 8, 4, False, 0),
        (128, 128, 8, 4, False, 1),
        (128, 128, 16, 3, False, 0),
        (128, 128, 16, 3, False, 1),
        (128, 128, 4, 3, True, 0),
        (128, 128, 8, 3, True, 1),
    ],
    False: [
        (128, 128, 8, 3, False, 0),
        (128, 128, 8, 3, False, 1),
        (128, 128, 8, 4, False, 0),
        (128, 128, 8, 4, False, 1),
        (128, 128, 4, 4, True, 0),
        (128, 128, 4, 4, False, 0),
    ],
}


def candidates(shape: Shape, rows: int) -> Iterator[tuple[int, bool, ProductTile]]:
    """(rows of a tile, gated, tile)."""
    pairs_of_expert = rows * shape.top_k / shape.num_experts  # of all ranks' experts alike
    few, many = (_FEW_FP8, _MANY_FP8) if shape.fp8 else (_FEW, _MANY)
    if pairs_of_expert <= 8:
        blocks = [16]
    elif pairs_of_expert <= 32:
        blocks = [16, 32, 64]
    else:
        blocks = [64, 128]
    for block_M in blocks:
        tiles = few if block_M <= 32 else many
        for gated in (True, False):
            for values in tiles[gated]:
                yield block_M, gated, ProductTile(*values)
