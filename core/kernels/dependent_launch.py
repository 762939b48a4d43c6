"""Programmatic dependent launch: a kernel may start while the one before ends (Hopper and later).

A kernel launched with `options(device)` begins when its predecessor says so or ends. It must call
`wait_for_predecessor` before it touches anything that earlier kernels wrote or still read. Before
that it may load what no kernel writes (weights); what was complete when a kernel before its
predecessor was launched plainly (a step's slots and positions: the embedding is such a kernel); and
what the predecessor itself had waited for, if that one waits before it lets its successor start.
Only kernels that do so may be launched this way.
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


@triton.jit
def fetch_lines(addresses):
    """Ask the second-level cache for a line of 128 bytes at each address; waits for none."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@lru_cache(maxsize=16)
def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of such a launch, DEPENDENT among them; a plain launch elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}
