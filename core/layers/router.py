"""Routing: which experts a row goes to, and which copies of them. Knows nothing of their weights.

Shape legend: T own rows, E hidden size, X logical experts, K experts of a row, C most copies of one
expert.
"""

import torch
from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.weights import WeightReader
from core.layers.moe_spec import MoELayerSpec
from core.parallel.experts import LayerPlacement
from core.parallel.layout import Layout


class Router:
    """(T, E) -> weights (T, K) float32 and logical ids (T, K) int64; the same on every rank."""

    __slots__ = ("_bias_X", "_gate", "_ops", "_routing")

    def __init__(self, context: BuildContext, weights: WeightReader, spec: MoELayerSpec) -> None:
        self._ops, self._routing = context.ops, spec.routing
        gate = weights.scope(spec.gate_name)
        shape = (spec.num_experts, spec.hidden_size)
        self._gate = context.ops.gate(gate.take("weight", shape))
        # Biases of neighbouring experts differ by less than bfloat16 can say.
        self._bias_X = (
            gate.take(spec.bias_name, (spec.num_experts,), dtype=torch.float32)
            if spec.has_bias
            else None
        )

    def __call__(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        return self._ops.grouped_top_k(self._gate(x_TE), self._bias_X, self._routing)


class ExpertMap:
    """Logical experts -> the physical ones of a placement; counts the rows of each.

    The copies of an expert are taken in turn by a row's position. Where ranks have rows of their
    own each starts at another copy, so that steps of few rows are spread too; where they all
    route the same rows, they choose the same copies. Never waits for the device.
    """

    def __init__(self, context: BuildContext, placement: LayerPlacement) -> None:
        alone = context.stream is Layout.REPLICATED
        self._first_position = 0 if alone else context.comms.axes["world"].rank
        self._device = context.device
        self._one = torch.ones(1, dtype=torch.int64, device=self._device)
        self._num_experts = placement.num_logical
        self._counts_X = self._no_counts()
        self.follow(placement)

    def follow(self, placement: LayerPlacement) -> None:
        """Route by this placement from now on."""
        copies = [placement.copies(expert) for expert in range(placement.num_logical)]
        self._most_copies = most = max(map(len, copies))
        padded = [[*of_expert, *[-1] * (most - len(of_expert))] for of_expert in copies]
        self._physical_XC = torch.tensor(padded, dtype=torch.int64, device=self._device)
        self._num_copies_X = torch.tensor(
            [len(of_expert) for of_expert in copies], dtype=torch.int64, device=self._device
        )

    def __call__(self, logical_TK: Tensor, num_real: int) -> Tensor:
        """Physical ids (T, K), -1 from row `num_real` on."""
        real = logical_TK[:num_real].flatten()
        self._counts_X.scatter_add_(0, real, self._one.expand(real.shape[0]))
        physical_TK = self._physical_of(logical_TK)
        if num_real < physical_TK.shape[0]:
            physical_TK[num_real:] = -1
        return physical_TK

    def take_counts(self) -> Tensor:
        """Real rows of each logical expert since the last call, int64 on the device."""
        counts_X, self._counts_X = self._counts_X, self._no_counts()
        return counts_X

    def _physical_of(self, logical_TK: Tensor) -> Tensor:
        if self._most_copies == 1:
            return self._physical_XC.view(-1)[logical_TK]
        first, num_rows = self._first_position, logical_TK.shape[0]
        positions_T = torch.arange(first, first + num_rows, device=self._device)
        copies_TK = positions_T.unsqueeze(1) % self._num_copies_X[logical_TK]
        return self._physical_XC.view(-1)[logical_TK * self._most_copies + copies_TK]

    def _no_counts(self) -> Tensor:
        return torch.zeros(self._num_experts, dtype=torch.int64, device=self._device)
