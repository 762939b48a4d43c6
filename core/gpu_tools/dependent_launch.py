"""Programmatic dependent launch: a kernel may start while the one before ends (Hopper and later).

A kernel launched with `options(device)` begins when its predecessor says so or ends. It must call
`wait_for_predecessor` before it touches anything that earlier kernels wrote or still read, and may
before that load what no kernel writes (weights). Only kernels that do so may be launched this way.
Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Everything the kernels before wrote is visible from here on. Nothing without DEPENDENT."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_successor_start(DEPENDENT: tl.constexpr):
    """The next kernel may be set up from here on; it still waits for this one's results."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@lru_cache(maxsize=16)
def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of such a launch, DEPENDENT among them; a plain launch elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}
