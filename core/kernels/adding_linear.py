"""Linear layers whose result goes to the residual: who adds it.

Shape legend: T rows, O rows of the weight, I inputs.
"""

from torch import Tensor

from core.interfaces.ops import LinearKernel

LEAST_ROWS = 2048  # that a GEMM adds; the norm of fewer takes little longer than its launch


class NormAdds:
    """The norm that follows does (core.interfaces.ops.AddingKernel)."""

    __slots__ = ("_kernel",)

    def __init__(self, kernel: LinearKernel) -> None:
        self._kernel = kernel

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._kernel(x_TI)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor | None:
        return self._kernel(x_TI)


class GemmAdds:
    """The vendor's GEMM does, to many rows of the weight's dtype: rounded once, and the norm reads
    and writes half as much."""

    __slots__ = ("_kernel", "_least_rows", "_weight_IO")

    def __init__(
        self, kernel: LinearKernel, weight_OI: Tensor, least_rows: int = LEAST_ROWS
    ) -> None:
        self._kernel, self._weight_IO, self._least_rows = kernel, weight_OI.t(), least_rows

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._kernel(x_TI)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor | None:
        many = x_TI.shape[0] >= self._least_rows
        if many and residual_TO.dtype is self._weight_IO.dtype:
            residual_TO.addmm_(x_TI, self._weight_IO)
            return None
        return self._kernel(x_TI)
