"""The fused operations layers are built with: one object per device, chosen once.

`core.kernels.torch_ops.TorchOps` is the oracle; others must agree with it (tests/contracts).
Shape legend: T rows, E hidden size, I intermediate size, H/G query and KV heads, D head dimension,
N pages, P tokens in a page.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

LinearKernel = Callable[[Tensor], Tensor]  # (T, in) -> (T, out)


class Ops(Protocol):
    """Operations on one device. Results are new tensors unless a docstring says otherwise."""

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> LinearKernel:
        """Prepare a linear layer (repacking the weight where that is faster): x @ W.T + b."""
        ...

    def logits(self, weight_VE: Tensor) -> LinearKernel:
        """Prepare an output head: (R, E) -> (R, V) in float32, a new tensor.

        The best tokens' logits are not rounded to the weight's dtype: near 25 bfloat16 has steps
        of 0.125, which makes ties of tokens that differ.
        """
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""
        ...

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); may overwrite either argument.

        The norm has the dtype of `x_TE`. The sum may be of a wider one, for the caller to pass
        back as the next residual: a stream that is rounded at every layer loses small terms.
        """
        ...

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CD: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate halves ("NeoX" style) by position. `cos_sin_CD` holds cos in its first D/2
        columns and sin in the rest, float32. May overwrite q and k."""
        ...

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension."""
        ...

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store row i at token slot `slots_T[i]` = page * P + offset (int64) of the caches."""
        ...
