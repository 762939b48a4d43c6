"""How warps and launches of Gluon kernels wait for each other.

Imported only where a Hopper GPU is, as the kernels are. Knows nothing of what they compute.
"""

# Kernels are written in Gluon, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from core.gpu_tools import dependent_launch

# All warps of a partition; the name changed between Triton 3.6 and 3.9.
warps_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
wait_for_predecessor = gluon.jit(dependent_launch.wait_for_predecessor.fn)
let_successor_start = gluon.jit(dependent_launch.let_successor_start.fn)


@gluon.jit
def release(barrier):
    """All warps of a partition are done with what `barrier` guards."""
    warps_barrier()
    mbarrier.arrive(barrier, count=1)
