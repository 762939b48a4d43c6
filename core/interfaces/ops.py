"""The fused operations that layers are built from: one object per device, chosen once.

`core.ops.torch_ops.TorchOps` is the oracle. Others must agree with it (tests/contracts).
Shape legend: T rows (tokens of a step), R rows with logits or rotated values of a head, V
vocabulary, E hidden size, I intermediate size, H/G query and KV heads, D head dimension, C
positions, N pages, P tokens in a page, Z values of a cached latent vector (of B pages), X logical
experts, K experts of a row.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from core.interfaces.attention import HeadTransform, LayerKV
from core.interfaces.destinations import Destinations as Destinations  # part of this contract
from core.interfaces.latent_attention import LatentTransform
from core.interfaces.moe_a2a import Dispatched
from core.interfaces.routing import Routing as Routing
from core.interfaces.weights import ExpertWeight, LinearWeight

LinearKernel = Callable[[Tensor], Tensor]  # (T, in) -> (T, out)


class ExpertKernel(Protocol):
    """The experts of one rank: gate, up and down projection in one call. Owns their weights."""

    def __call__(self, dispatched: Dispatched) -> Tensor:
        """Return the results of dispatched rows, in the model's dtype.

        The layout is that of `dispatched.hidden` (2 or 3 dimensions). Rows without an expert have
        undefined contents. With `dispatched.routes` the result of a row is the sum over its experts
        of weight * f_expert(x), in float32 before rounding; 0 for rows without experts."""
        ...

    def read(self, expert: int) -> tuple[ExpertWeight, ExpertWeight]:
        """Return the matrices of a local expert: gate and up (2I, E), and down (E, I).

        They must not be written to. They are valid until the next `write`."""
        ...

    def write(self, expert: int, gate_up_2IE: ExpertWeight, down_EI: ExpertWeight) -> None:
        """Replace a local expert by matrices of the same weight format. Copies them."""
        ...


# One expert: (gate, then up, as one matrix (2I, E); down (E, I)).
ExpertWeights = tuple[ExpertWeight, ExpertWeight]


class Ops(Protocol):
    """Operations on one device. Results are new tensors, unless a docstring says otherwise."""

    def linear(self, weight_OI: LinearWeight, bias_O: Tensor | None) -> LinearKernel:
        """Prepare a linear layer, x @ W.T + b. May repack the weight."""
        ...

    def logits(self, weight_VE: Tensor, *, quantized: bool = False) -> LinearKernel:
        """Prepare an output head: (R, E) -> (R, V) in float32, a new tensor.

        `quantized`: the checkpoint stores the weight with so few bits that 16 bits are enough for
        it. The logits of the best tokens must not be rounded to the weight's dtype: near 25,
        bfloat16 has steps of 0.125, so different tokens would tie.
        """
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 inside."""
        ...

    def add_rms_norm(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return (rms_norm(x + residual), x + residual). May overwrite both arguments.

        The norm has the dtype of `x_TE`. The sum may have a wider dtype. The caller passes it back
        as the next residual: a residual that is rounded at every layer loses small terms.
        """
        ...

    def rope(
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate the first R values of each head by position, in halves ("NeoX" style).

        Values i and i + R/2 are a pair. Values past R do not change. `cos_sin_CR` is float32: cos
        in the first R/2 columns, sin in the rest. `positions_T` is int64. May overwrite q and k."""
        ...

    def gated_linear(self, weight_2IE: LinearWeight, bias_2I: Tensor | None) -> LinearKernel:
        """Prepare the first half of a gated MLP: (T, E) -> (T, I).

        It is `silu_and_mul` of the linear layer. The first I outputs of the layer are the gate, the
        others are multiplied by it."""
        ...

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """Return silu(first half) * second half of the last dimension: (T, 2I) -> (T, I)."""
        ...

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store row i in the caches at token slot `slots_T[i]` = page * P + offset (int64)."""
        ...

    def prepare_heads(
        self,
        qkv_TFD: Tensor,
        heads: HeadTransform,
        positions_T: Tensor,
        cache: LayerKV,
        slots_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms of heads, `rope` and `write_kv` in one. Returns (q_THD, k_TGD, v_TGD) of all rows.

        Each row of `qkv_TFD` has H query heads, G key heads and G value heads. It may be
        overwritten, and the results may be views of it.

        Rows past `slots_T` and rows with a negative slot are padding. They are not stored. Their
        results are undefined, but finite if the inputs are. Only devices that capture steps get
        negative slots."""
        ...

    def rope_interleaved(
        self, q_THR: Tensor, k_TGR: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate neighbouring pairs ("GPT-J" style) by position, and return them as halves.

        The result of pair i is at i and i + R/2. This order is that of transformers, and it does
        not change the scores of q and k. May overwrite q and k."""
        ...

    def prepare_latent(
        self,
        q_THR: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        cache_BPZ: Tensor,
        slots_T: Tensor,
    ) -> Tensor:
        """Return the rotated rotary parts of queries (T, H, R), and store the cached vectors.

        The last R of the Z columns of `cached_TZ` are the rotary part of the key: they are rotated.
        The others are the latent: it is normalised. Row i is stored at token slot `slots_T[i]` =
        page * P + offset (int64). May overwrite `q_THR`.

        Rows past `slots_T` and rows with a negative slot are padding. They are not stored. The
        results of their queries are undefined, but finite if the inputs are. Only devices that
        capture steps get negative slots."""
        ...

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Prepare this rank's experts, down(silu(gate x) * up x), for all layouts.

        `dtype` is the dtype of results. The iterable gives one expert at a time, all of the same
        shape and weight format, so that reading them needs little additional memory. The kernel may
        keep the tensors."""
        ...

    def gate(self, weight_XE: Tensor) -> LinearKernel:
        """Prepare a router: (T, E) -> (T, X) float32, a new tensor.

        Logits must not be rounded to the weight's dtype: experts with nearly equal scores would
        change their order."""
        ...

    def grouped_top_k(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """Choose the experts of each row: (weights (T, K) float32, logical ids (T, K) int64).

        `logits_TX` is float32."""
        ...

    def beside(self, work: LinearKernel, x_TE: Tensor) -> Callable[[], Tensor]:
        """Start `work(x)`, which may run at the same time as later calls (on a second stream).

        This helps a device that few rows do not fill. Call the returned function once to get the
        result. Until then keep `x`, and do not call `beside` again."""
        ...

    def route(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing, to: Destinations
    ) -> tuple[Tensor, Tensor]:
        """`grouped_top_k`, then the physical expert of each logical one.

        Returns weights (T, K) float32 and physical ids (T, K) int64; padding rows have weight 0 and
        id -1. Adds the real rows of each expert to `to.counts_X`. Never waits for the device on
        devices that capture steps."""
        ...
