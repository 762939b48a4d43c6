"""The operations of mixtures of experts in plain torch: the oracle of the other sets.

Computes in float32, or wider where its arguments are; a loop over experts that waits for a GPU's
counts. Knows nothing of speed. Shape legend: T rows, E hidden size, I intermediate size, X logical
experts, K experts of a row, L local experts, M dispatched rows, G groups of experts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import (
    Destinations,
    ExpertKernel,
    ExpertWeights,
    LinearKernel,
    Routing,
)
from core.interfaces.weights import BlockFp8, ExpertWeight
from core.ops.block_fp8 import dequantize, dequantize_rows
from core.ops.expert_map import map_experts
from core.ops.moe_permute import sum_grouped
from core.ops.precision import accurate

# Added to the sum that weights are divided by, as DeepSeek-V3 does: all scores may be 0.
_LEAST_SUM = 1e-20


def expert_rows(hidden: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(local expert, a view of its rows) in either layout, for experts that have any."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            batched = hidden.dim() == 3
            yield expert, hidden[expert, :count] if batched else hidden[first : first + count]
        first += count


def plain_rows(dispatched: Dispatched, dtype: torch.dtype) -> Tensor:
    """The received rows, dequantised where they travelled as fp8."""
    if dispatched.scales is None:
        return dispatched.hidden
    return dequantize_rows(dispatched.hidden, dispatched.scales, dtype)


def stack_experts(experts: Iterable[ExpertWeights], num_experts: int) -> ExpertWeights:
    """The matrices of all experts along a new first dimension, filled one expert at a time."""
    found = iter(experts)
    first = next(found)
    gate_up_L2IE, down_LEI = (_room_for(matrix, num_experts) for matrix in first)
    for index, (gate_up_2IE, down_EI) in enumerate(itertools.chain((first,), found)):
        write_matrix(gate_up_L2IE, index, gate_up_2IE)
        write_matrix(down_LEI, index, down_EI)
    assert index == num_experts - 1, f"{index + 1} experts, {num_experts} promised"
    return gate_up_L2IE, down_LEI


def _room_for(matrix: ExpertWeight, count: int) -> ExpertWeight:
    if isinstance(matrix, BlockFp8):
        values, scales = matrix.values_OI, matrix.scales
        return BlockFp8(
            values.new_empty(count, *values.shape),
            scales.new_empty(count, *scales.shape, dtype=torch.float32),
        )
    return matrix.new_empty(count, *matrix.shape)


def experts_of(stacked: ExpertWeight) -> int:
    """How many experts stand in a stacked matrix."""
    values = stacked.values_OI if isinstance(stacked, BlockFp8) else stacked
    return values.shape[0]


def matrix_of(stacked: ExpertWeight, expert: int) -> ExpertWeight:
    """A view of one expert's matrix."""
    if isinstance(stacked, BlockFp8):
        return BlockFp8(stacked.values_OI[expert], stacked.scales[expert])
    return stacked[expert]


def write_matrix(stacked: ExpertWeight, expert: int, matrix: ExpertWeight) -> None:
    """Copy a matrix of the same form over one expert's."""
    if isinstance(stacked, BlockFp8):
        assert isinstance(matrix, BlockFp8)
        stacked.values_OI[expert].copy_(matrix.values_OI)
        stacked.scales[expert].copy_(matrix.scales)
    else:
        assert isinstance(matrix, Tensor)
        stacked[expert].copy_(matrix)


class TorchExperts:
    """core.interfaces.ops.ExpertKernel, one expert after the other."""

    def __init__(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> None:
        self._gate_up_L2IE, self._down_LEI = stack_experts(experts, num_experts)
        self._dtype = dtype

    def __call__(self, dispatched: Dispatched) -> Tensor:
        if dispatched.routes is not None:
            num_experts = experts_of(self._down_LEI)
            return sum_grouped(self, dispatched, dispatched.routes, num_experts, self._dtype)
        hidden = accurate(plain_rows(dispatched, torch.float32))
        out = torch.zeros_like(hidden)
        counts = dispatched.counts_L.tolist()
        results = expert_rows(out, counts)
        for (expert, x_ME), (_, out_ME) in zip(expert_rows(hidden, counts), results, strict=True):
            gate_up_2IE, down_EI = (self._wide(matrix, hidden) for matrix in self.read(expert))
            gate_MI, up_MI = F.linear(x_ME, gate_up_2IE).chunk(2, dim=-1)
            out_ME.copy_(F.linear(F.silu(gate_MI) * up_MI, down_EI))
        return out.to(self._dtype)

    def read(self, expert: int) -> tuple[ExpertWeight, ExpertWeight]:
        return matrix_of(self._gate_up_L2IE, expert), matrix_of(self._down_LEI, expert)

    def write(self, expert: int, gate_up_2IE: ExpertWeight, down_EI: ExpertWeight) -> None:
        write_matrix(self._gate_up_L2IE, expert, gate_up_2IE)
        write_matrix(self._down_LEI, expert, down_EI)

    @staticmethod
    def _wide(matrix: ExpertWeight, like: Tensor) -> Tensor:
        if isinstance(matrix, BlockFp8):
            return dequantize(matrix, like.dtype)
        return matrix.to(like.dtype)


class TorchMoeOps:
    """The part of core.interfaces.ops.Ops that mixtures of experts need, in plain torch."""

    def experts(
        self, experts: Iterable[ExpertWeights], num_experts: int, dtype: torch.dtype
    ) -> ExpertKernel:
        """Computed in float32 or wider, rounded once."""
        return TorchExperts(experts, num_experts, dtype)

    def gate(self, weight_XE: Tensor) -> LinearKernel:
        """Multiplied in float32 or wider."""
        weight_XE = accurate(weight_XE)
        return lambda x_TE: F.linear(x_TE.to(weight_XE.dtype), weight_XE)

    def beside(self, work: LinearKernel, x_TE: Tensor) -> Callable[[], Tensor]:
        """At once."""
        result = work(x_TE)
        return lambda: result

    def grouped_top_k(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """As the models' reference code does it; experts of equal worth in any order."""
        if routing.scoring == "uniform_random":
            scores_TX, bias_X = _uniform_scores(logits_TX), None
        else:
            scores_TX = _scores(logits_TX, routing.scoring)
        worth_TX = scores_TX if bias_X is None else scores_TX + bias_X
        if routing.num_groups > 1:
            worth_TX = _in_chosen_groups(worth_TX, routing)
        ids_TK = worth_TX.topk(routing.top_k, dim=-1).indices
        weights_TK = scores_TX.gather(1, ids_TK)
        if routing.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _LEAST_SUM)
        return weights_TK * routing.scale, ids_TK

    def route(
        self, logits_TX: Tensor, bias_X: Tensor | None, routing: Routing, to: Destinations
    ) -> tuple[Tensor, Tensor]:
        """One after the other."""
        weights_TK, logical_TK = self.grouped_top_k(logits_TX, bias_X, routing)
        return weights_TK, map_experts(logical_TK, weights_TK, to)


def _scores(logits_TX: Tensor, scoring: str) -> Tensor:
    match scoring:
        case "softmax":
            return logits_TX.softmax(-1)
        case "sigmoid":
            return logits_TX.sigmoid()
        case _:
            raise AssertionError(f"scoring {scoring!r} passed the parser")


def _uniform_scores(logits_TX: Tensor) -> Tensor:
    """A hash of each logit's bits, row and expert as a number from 0 to 1 (24 bits of it), by
    MurmurHash3's last mixing steps."""
    num_rows, num_experts = logits_TX.shape
    rows_T1 = torch.arange(num_rows, device=logits_TX.device).unsqueeze(1)
    experts_X = torch.arange(num_experts, device=logits_TX.device)
    mixed_TX = logits_TX.contiguous().view(torch.int32).long() ^ (rows_T1 * 0x85EBCA6B)
    mixed_TX = (mixed_TX ^ (experts_X * 0x9E3779B1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed_TX = ((mixed_TX ^ (mixed_TX >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed_TX ^ (mixed_TX >> 16)) >> 8).float() * 2.0**-24


def _in_chosen_groups(worth_TX: Tensor, routing: Routing) -> Tensor:
    """-inf for experts outside of the best groups."""
    num_rows, num_experts = worth_TX.shape
    worth_TGS = worth_TX.view(num_rows, routing.num_groups, num_experts // routing.num_groups)
    groups_TG = worth_TGS.topk(routing.group_top, dim=-1).values.sum(-1)
    chosen_TC = groups_TG.topk(routing.num_chosen_groups, dim=-1).indices
    excluded_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, chosen_TC, False)
    return worth_TGS.masked_fill(excluded_TG.unsqueeze(-1), -torch.inf).flatten(1)
