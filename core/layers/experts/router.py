"""Routing: which experts a row goes to, and which copies of them. Knows nothing of their weights.

Shape legend: T own rows, E hidden size, X logical experts, K experts of a row, C most copies of one
expert.
"""

import torch
from torch import Tensor

from core.interfaces.destinations import Copies, Destinations
from core.interfaces.model import BuildContext
from core.interfaces.weights import WeightReader
from core.layers.experts.moe_spec import MoELayerSpec
from core.parallel.experts import LayerPlacement
from core.parallel.layout import Layout


class Router:
    """(T, E) -> weights (T, K) float32 and physical ids (T, K) int64 of the experts of each row."""

    __slots__ = ("_bias_X", "_gate", "_ops", "_routing")

    def __init__(self, context: BuildContext, weights: WeightReader, spec: MoELayerSpec) -> None:
        self._ops, self._routing = context.ops, spec.routing
        if context.experts is not None and context.experts.uniform_routing:
            self._routing = spec.routing.uniform()
        gate = weights.scope(spec.gate_name)
        shape = (spec.num_experts, spec.hidden_size)
        self._gate = context.ops.gate(gate.take("weight", shape))
        # Biases of neighbouring experts differ by less than bfloat16 can say.
        self._bias_X = (
            gate.take(spec.bias_name, (spec.num_experts,), dtype=torch.float32)
            if spec.has_bias
            else None
        )

    def __call__(self, x_TE: Tensor, to: Destinations) -> tuple[Tensor, Tensor]:
        return self._ops.route(self._gate(x_TE), self._bias_X, self._routing, to)


class ExpertMap:
    """Logical experts -> the physical ones of a placement; counts the rows of each.

    The copies of an expert are taken in turn by a row's position. Where ranks have rows of their
    own each starts at another copy, so that steps of few rows are spread too. Where they all route
    the same rows they choose the same copies, and each is told of its own alone: ids are those of
    its local experts, and -1 for all others. Never waits for the device, and keeps its
    tensors where they are: a CUDA graph knows their addresses.
    """

    def __init__(self, context: BuildContext, placement: LayerPlacement) -> None:
        alone = context.stream is Layout.REPLICATED
        self._first_copy = 0 if alone else context.comms.axes["world"].rank
        self._local_ids = range(placement.num_local) if alone else None
        self._first_local = context.comms.axes["ep"].rank * placement.num_local
        num_logical, device = placement.num_logical, context.device
        most_copies = len(placement.logical_of) - num_logical + 1
        self._copies = Copies(
            torch.empty((num_logical, most_copies), dtype=torch.int64, device=device),
            torch.empty(num_logical, dtype=torch.int64, device=device),
        )
        self._counts_X = torch.zeros(num_logical, dtype=torch.int64, device=device)
        self.follow(placement)

    def follow(self, placement: LayerPlacement) -> None:
        """Route by this placement from now on; it has as many physical experts as the first."""
        copies = [placement.copies(expert) for expert in range(placement.num_logical)]
        most = self._copies.physical_XC.shape[1]
        padded = [
            [*map(self._id_of, of_expert), *[-1] * (most - len(of_expert))] for of_expert in copies
        ]
        self._copies.physical_XC.copy_(torch.tensor(padded))
        self._copies.num_copies_X.copy_(torch.tensor([len(of_expert) for of_expert in copies]))

    def _id_of(self, physical: int) -> int:
        if self._local_ids is None:
            return physical
        local = physical - self._first_local
        return local if local in self._local_ids else -1

    def __call__(self, num_real: Tensor, first_row: int) -> Destinations:
        """Where a step's rows go, and where they are counted: `num_real` (int32 (1,), on the
        device) of them, where row 0 is number `first_row`."""
        return Destinations(self._copies, self._counts_X, num_real, first_row, self._first_copy)

    def take_counts(self) -> Tensor:
        """Real rows of each logical expert since the last call, int64 on the device."""
        counts_X = self._counts_X.clone()
        self._counts_X.zero_()
        return counts_X
