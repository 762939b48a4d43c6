"""One rank's experts of a layer: loading, computing, and moving them while the model serves.

Each expert is cut along its intermediate size over the axis "tp_expert"; which experts a rank of
the axis "ep" has, a placement says. Knows nothing of routing rules or of what carries rows.
Shape legend: T rows, E hidden size, I local intermediate size, K experts of a row, B bytes of one
expert.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.interfaces.model import BuildContext
from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import Destinations, ExpertWeights
from core.interfaces.weights import BlockFp8, ExpertWeight, WeightReader, expert_weight
from core.layers.experts.expert_moves import Move, expert_moves
from core.layers.experts.moe_spec import MoELayerSpec
from core.layers.experts.router import ExpertMap
from core.parallel.experts import LayerPlacement
from core.parallel.sharding import Sharding


class LocalExperts:
    """The experts of one rank (core.interfaces.model.ExpertLayer); reads them when made."""

    def __init__(
        self, context: BuildContext, weights: WeightReader, spec: MoELayerSpec, layer: int
    ) -> None:
        assert context.experts is not None, "a model with experts is built with their placement"
        self.layer = layer
        self.placement = context.experts.placements[layer]
        self._comm = context.comms.axes["ep"]
        self._map = ExpertMap(context, self.placement)
        local = self.placement.local(self._comm.rank)
        self._kernel = context.ops.experts(
            _read_experts(context, weights.scope(spec.experts_name), spec, local),
            len(local),
            context.dtype,
        )

    def destinations(self, num_real: Tensor, first_row: int) -> Destinations:
        """Which physical experts rows go to; see `core.layers.experts.router.ExpertMap`."""
        return self._map(num_real, first_row)

    def __call__(self, dispatched: Dispatched) -> Tensor:
        """Results of the received rows, partial sums over tp_expert."""
        return self._kernel(dispatched)

    def take_counts(self) -> Tensor:
        """Rows this rank has sent to each logical expert since the last call."""
        return self._map.take_counts()

    def move(self, placement: LayerPlacement) -> None:
        """Exchange weights with the other ranks of ep; all call this between the same steps.

        Holds what it sends and receives a second time while it runs."""
        moves = expert_moves(self.placement, placement)
        me, ranks = self._comm.rank, range(self._comm.size)
        sent = [m for m in moves if m.source == me and m.target != me]
        came = [m for m in moves if m.target == me and m.source != me]
        sent.sort(key=lambda move: (move.target, move.slot))
        came.sort(key=lambda move: (move.source, move.slot))
        # Every rank knows all moves, so either all exchange or none does.
        traffic = any(move.source != move.target for move in moves)
        kept = [m for m in moves if m.target == m.source == me]
        written = {move.slot: self._bytes_of(move.source_slot) for move in kept}
        if traffic:
            received = self._comm.all_to_all(
                self._rows(sent),
                [sum(move.target == rank for move in sent) for rank in ranks],
                [sum(move.source == rank for move in came) for rank in ranks],
            )
            written |= {move.slot: row for move, row in zip(came, received, strict=True)}
        for slot, row_B in written.items():
            self._write(slot, row_B)
        self.placement = placement
        self._map.follow(placement)

    def _rows(self, moves: list[Move]) -> Tensor:
        if not moves:
            return self._bytes_of(0).new_empty(0, self._bytes_of(0).shape[0])
        return torch.stack([self._bytes_of(move.source_slot) for move in moves])

    def _bytes_of(self, slot: int) -> Tensor:
        """All matrices of a local expert as (B,) uint8, a copy."""
        parts = [part for matrix in self._kernel.read(slot) for part in _tensors(matrix)]
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])

    def _write(self, slot: int, row_B: Tensor) -> None:
        like = self._kernel.read(slot)
        sizes = [part.nbytes for matrix in like for part in _tensors(matrix)]
        parts = iter(row_B.split_with_sizes(sizes))
        gate_up_2IE, down_EI = (_rebuilt(matrix, parts) for matrix in like)
        self._kernel.write(slot, gate_up_2IE, down_EI)


def _read_experts(
    context: BuildContext, weights: WeightReader, spec: MoELayerSpec, local: Sequence[int]
) -> Iterator[ExpertWeights]:
    """The local experts in order, each read when it is asked for; no two share memory."""
    repeated: dict[int, ExpertWeights] = {}  # of those that stand on this rank more than once
    for expert in local:
        if expert in repeated:
            gate_up_2IE, down_EI = repeated[expert]
            yield _copy(gate_up_2IE), _copy(down_EI)
            continue
        found = _read_expert(context, weights.scope(str(expert)), spec)
        if local.count(expert) > 1:
            repeated[expert] = found
        yield found


def _read_expert(context: BuildContext, weights: WeightReader, spec: MoELayerSpec) -> ExpertWeights:
    """(gate and up rows back to back, down) of one expert, this rank's part."""
    weight_format, names = context.format, spec.names
    hidden_size, size = spec.hidden_size, spec.expert_intermediate_size
    sharding = Sharding.over(context.comms.axes["tp_expert"])
    gate, up = (
        weight_format.take(weights, f"{name}.weight", (size, hidden_size), sharding.equal(0))
        for name in (names.gate, names.up)
    )
    down = weight_format.take(
        weights, f"{names.down}.weight", (hidden_size, size), sharding.equal(1)
    )
    return expert_weight(weight_format.join([gate, up])), expert_weight(down)


def _copy(matrix: ExpertWeight) -> ExpertWeight:
    if isinstance(matrix, BlockFp8):
        return BlockFp8(matrix.values_OI.clone(), matrix.scales.clone())
    return matrix.clone()


def _tensors(matrix: ExpertWeight) -> tuple[Tensor, ...]:
    return (matrix.values_OI, matrix.scales) if isinstance(matrix, BlockFp8) else (matrix,)


def _rebuilt(like: ExpertWeight, parts: Iterator[Tensor]) -> ExpertWeight:
    """A matrix of the form of `like` out of the bytes of its tensors."""
    # Bytes cut out of a row may start anywhere, but a tensor's at a multiple of its item's size.
    tensors = [
        next(parts).clone().view(tensor.dtype).view(tensor.shape) for tensor in _tensors(like)
    ]
    return BlockFp8(*tensors) if isinstance(like, BlockFp8) else tensors[0]
