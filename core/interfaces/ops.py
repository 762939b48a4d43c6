"""The fused operations layers are built with: one object per device, chosen once.

`core.ops.torch_ops.TorchOps` is the oracle; others must agree with it (tests/contracts).
Shape legend: T rows, E hidden size, I intermediate size, H/G query and KV heads, D head dimension,
C positions, R values of a head that turn, N pages, P tokens in a page.
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
    """The experts of one rank: gate, up and down projection in one. Owns their weights."""

    def __call__(self, dispatched: Dispatched) -> Tensor:
        """Dispatched rows -> their results, in the same layout (that of `hidden`: 2 dimensions or
        3) and in the model's dtype. What stands in rows that no expert has is undefined.

        Of rows with routes the result is the sum over their experts of weight * f_expert(x), added
        up in float32; 0 for rows without experts."""
        ...

    def read(self, expert: int) -> tuple[ExpertWeight, ExpertWeight]:
        """The matrices of a local expert: gate and up (2I, E), and down (E, I). Not to be written
        into; valid until the next `write`."""
        ...

    def write(self, expert: int, gate_up_2IE: ExpertWeight, down_EI: ExpertWeight) -> None:
        """Replace a local expert by matrices of the same form; copies them."""
        ...


# (gate and up rows back to back (2I, E), down (E, I)) of one expert.
ExpertWeights = tuple[ExpertWeight, ExpertWeight]


class Ops(Protocol):
    """Operations on one device. Results are new tensors unless a docstring says otherwise."""

    def linear(self, weight_OI: LinearWeight, bias_O: Tensor | None) -> LinearKernel:
        """Prepare a linear layer (repacking the weight where that is faster): x @ W.T + b."""
        ...

    def logits(self, weight_VE: Tensor, *, quantized: bool = False) -> LinearKernel:
        """Prepare an output head: (R, E) -> (R, V) in float32, a new tensor. `quantized`: the
        checkpoint has the weight in so few bits that 16 are enough for it.

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
        self, q_THD: Tensor, k_TGD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate the halves of each head's first R values ("NeoX" style) by position: i and i + R/2
        form a pair. What a head has beyond R passes through. `cos_sin_CR` holds cos in its first
        R/2 columns and sin in the rest, float32. May overwrite q and k."""
        ...

    def gated_linear(self, weight_2IE: LinearWeight, bias_2I: Tensor | None) -> LinearKernel:
        """Prepare the first half of a gated MLP: (T, E) -> silu_and_mul of the linear layer, whose
        first I outputs are the gate and the rest what it multiplies."""
        ...

    def silu_and_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension."""
        ...

    def write_kv(
        self, k_TGD: Tensor, v_TGD: Tensor, k_NPGD: Tensor, v_NPGD: Tensor, slots_T: Tensor
    ) -> None:
        """Store row i at token slot `slots_T[i]` = page * P + offset (int64) of the caches."""
        ...

    def prepare_heads(
        self,
        qkv_TFD: Tensor,
        heads: HeadTransform,
        positions_T: Tensor,
        cache: LayerKV,
        slots_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms of heads, `rope` and `write_kv` at once: (q_THD, k_TGD, v_TGD) of all rows.

        `qkv_TFD` holds H query heads, G key heads and G value heads in each row; it may be
        overwritten, and what is returned be views of it. Rows past `slots_T`, and those whose slot
        is negative, are padding: they are not stored, and what they become is undefined, though no
        worse than what they were. Only devices that capture steps get negative slots."""
        ...

    def rope_interleaved(
        self, q_THR: Tensor, k_TGR: Tensor, cos_sin_CR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate neighbouring pairs ("GPT-J" style) by position, and leave them as halves: the
        result of pair i stands at i and i + R/2. Scores of q and k don't change by that order,
        and it is transformers'. May overwrite q and k."""
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
        """Rotate queries' rotary parts, which are returned, and that of each row's key (the last R
        of its Z columns), normalise its latent (the others), and store both, row i at token slot
        `slots_T[i]` = page * P + offset (int64) of the cache. May overwrite q.

        Rows past `slots_T`, and those whose slot is negative, are padding: they are not stored,
        and what their queries become is undefined, though no worse than what they were. Only
        devices that capture steps get negative slots."""
        ...

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Prepare this rank's experts: down(silu(gate x) * up x) of each row's expert, in all
        layouts. `dtype` is that of results.

        Takes in one expert after the other, of one shape and form, so that reading them needs
        little more memory than they do. May keep what it is given."""
        ...

    def gate(self, weight_XE: Tensor) -> LinearKernel:
        """Prepare a router: (T, E) -> (T, X) float32, a new tensor. No logit is rounded to the
        weight's dtype: neighbours in worth would change places."""
        ...

    def grouped_top_k(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """Choose the experts of each row: (weights (T, K) float32, logical ids (T, K) int64).

        `logits_TX` float32."""
        ...

    def beside(self, work: LinearKernel, x_TE: Tensor) -> Callable[[], Tensor]:
        """Begin `work(x)`, which may run beside what is called from here on: a device that few
        rows leave idle does both at once. Call what is returned, once, for the result; until then
        keep `x`, and begin nothing else."""
        ...

    def route(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing, to: Destinations
    ) -> tuple[Tensor, Tensor]:
        """`grouped_top_k`, then where each expert stands: (weights (T, K) float32, physical ids
        (T, K) int64; 0 and -1 in rows that are padding). Counts the real rows of each expert.
        Never waits for the device where it captures steps."""
        ...
