"""RMSNorm with its weight, alone or fused with the residual's addition."""

from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.weights import WeightReader


class RMSNorm:
    """Normalises the last dimension; the same on every rank."""

    __slots__ = ("_ops", "eps", "weight_E")

    def __init__(
        self, context: BuildContext, weights: WeightReader, name: str, size: int, eps: float
    ) -> None:
        self._ops = context.ops
        self.weight_E = weights.take(f"{name}.weight", (size,))
        self.eps = eps

    def __call__(self, x_TE: Tensor) -> Tensor:
        return self._ops.rms_norm(x_TE, self.weight_E, self.eps)

    def add(self, x_TE: Tensor, residual_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the new residual, the new residual x + residual)."""
        return self._ops.add_rms_norm(x_TE, residual_TE, self.weight_E, self.eps)
