"""Linear layers of 16-bit weights on a GPU: which kernel runs for how many rows.

The choice is data (core/gpu_tools/tuned/{linear,gated_linear,logits,gate}_bf16.json, measured by
benchmarks.gpu_linear), looked up when a layer is built: in a step it costs one list index. Knows
nothing of what the kernels do inside. Shape legend: T rows, O rows of the weight, I inputs.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from core.devices.cuda.linear.triton_skinny import matrix, vector
from core.devices.cuda.linear.triton_wide import wide
from core.gpu_tools import tuning
from core.interfaces.ops import LinearKernel

MOST_ROWS = 1024  # looked up by their number; beyond, few rows of a table are left to choose from
_BUSY_PROGRAMS = 128  # about one for each processor of a large GPU
_PATHS = {"vector": vector, "matrix": matrix, "wide": wide}
_GLUON = "core.devices.cuda.linear.gluon_gated"  # for Hopper, and for it alone to be imported


def prepare(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None,
    tile: tuning.Choice,
) -> LinearKernel:
    """One kernel, for up to `tile["max_rows"]` rows."""
    if tile["path"] == "gluon":
        assert gated
        assert _gluon_takes(weight_OI, bias_O, dtype)
        kernel: LinearKernel = importlib.import_module(_GLUON).gated(weight_OI)
        return kernel
    make = _PATHS[tile["path"]]
    return make(weight_OI, bias_O, gated=gated, dtype=dtype, tile=tile)


def linear(
    operation: str,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    vendor: LinearKernel,
    *,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> LinearKernel:
    """The fastest kernel for each number of rows; `vendor` computes the same for any number."""
    if not _streams(weight_OI):
        return vendor
    found = tuple(
        choice
        for choice in measured(f"{operation}_bf16", weight_OI.device, *weight_OI.shape)
        if choice["path"] != "gluon" or _gluon_takes(weight_OI, bias_O, dtype)
    )
    prepared: dict[int, LinearKernel] = {}
    by_rows = [vendor]
    for num_rows in range(1, MOST_ROWS + 1):
        choice = tuning.choose(found, num_rows)
        if choice is None or choice["path"] == "vendor":
            by_rows.append(vendor)
            continue
        most = choice["max_rows"]
        if most not in prepared:
            prepared[most] = prepare(weight_OI, bias_O, gated=gated, dtype=dtype, tile=choice)
        by_rows.append(prepared[most])
    many = [
        (
            choice["max_rows"],
            vendor
            if choice["path"] == "vendor"
            else prepare(weight_OI, bias_O, gated=gated, dtype=dtype, tile=choice),
        )
        for choice in found
        if choice["max_rows"] > MOST_ROWS
    ]
    if all(kernel is vendor for kernel in (*by_rows, *(kernel for _, kernel in many))):
        return vendor

    def run(x_TI: Tensor) -> Tensor:
        num_rows = x_TI.shape[0]
        if num_rows <= MOST_ROWS:
            return by_rows[num_rows](x_TI)
        return next((kernel for most, kernel in many if num_rows <= most), vendor)(x_TI)

    return run


def _gluon_takes(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None) -> bool:
    return bool(importlib.import_module(_GLUON).takes(weight_OI, bias_O, dtype))


def _streams(weight_OI: Tensor) -> bool:
    """Whether the kernels here can read a weight 16 bytes at a time."""
    return (
        weight_OI.dtype in (torch.bfloat16, torch.float16)
        and weight_OI.is_contiguous()
        and weight_OI.shape[1] % 8 == 0
        and weight_OI.data_ptr() % 16 == 0
    )


@lru_cache(maxsize=256)
def measured(
    operation: str, device: torch.device, size_O: int, size_I: int
) -> tuple[tuning.Choice, ...]:
    """What the tables say of a shape; where they are silent, what is good for most."""
    found = tuning.choices(operation, device, outputs=size_O, inputs=size_I)
    return found or (usual_vector(size_O, size_I), usual_matrix(size_O, size_I))


def usual_vector(size_O: int, size_I: int) -> dict[str, Any]:
    """Tiles of 4,096 weights, so that many programs share a processor."""
    block_I = min(2048, triton.next_power_of_2(size_I))
    return {
        "path": "vector",
        "max_rows": 1,
        "ROWS": 1,
        "BLOCK_O": min(8, 4096 // block_I),
        "BLOCK_I": block_I,
        "num_warps": 4,
    }


def usual_matrix(size_O: int, size_I: int) -> dict[str, Any]:
    """Deep pipelines; sums are shared where there would be too few of them."""
    return {
        "path": "matrix",
        "max_rows": 16,
        "BLOCK_T": 16,
        "BLOCK_O": 64,
        "BLOCK_I": 256,
        "SPLIT": max(1, min(4, size_I // 256, _BUSY_PROGRAMS // triton.cdiv(size_O, 64))),
        "PREFETCH_I": 512,
        "num_warps": 4,
        "num_stages": 4,
    }
