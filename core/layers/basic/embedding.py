"""Token embedding and output head, cut along the vocabulary over ranks.

The vocabulary is padded with zero rows so that any number of ranks divides it; ids and logits
past its end never occur outside of this file. Shape legend: T rows, R rows whose logits are wanted,
E hidden size, V vocabulary, L this rank's part of the padded vocabulary, A rows of all DP ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.comm import SoloCommunicator
from core.interfaces.model import BestTokens, BuildContext, VocabularyPart
from core.layers.basic.row_exchange import row_exchange
from core.ops.ragged import gather_rows
from core.parallel.layout import Layout
from core.parallel.rows import StepRows
from core.parallel.sharding import Sharding


class VocabEmbedding:
    """Ids -> vectors in the stream's layout: each rank of tp looks up what it has, and the sum
    over them is the answer."""

    __slots__ = ("_exchange", "_lookup", "_start", "weight_LE")

    def __init__(self, context: BuildContext, name: str, vocab_size: int, hidden_size: int) -> None:
        shard = Sharding.over(context.comms.axes["tp"]).padded(0)
        shape = (vocab_size, hidden_size)
        self.weight_LE = context.weights.take(f"{name}.weight", shape, shard)
        self._start, stop = shard.bounds(vocab_size)
        holds_all = (self._start, stop) == (0, vocab_size)
        self._lookup = self._lookup_all if holds_all else self._lookup_part
        self._exchange = row_exchange(context, "tp")

    def __call__(self, input_ids_T: Tensor, rows: StepRows) -> Tensor:
        return self._exchange.scatter(self._lookup(input_ids_T), rows)

    def _lookup_all(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight_LE)

    def _lookup_part(self, input_ids_T: Tensor) -> Tensor:
        local_ids_T = input_ids_T - self._start
        elsewhere_T = (local_ids_T < 0) | (local_ids_T >= self.weight_LE.shape[0])
        hidden_TE = F.embedding(local_ids_T.masked_fill_(elsewhere_T, 0), self.weight_LE)
        return hidden_TE.masked_fill_(elsewhere_T.unsqueeze(1), 0)


def is_quantized(
    context: BuildContext, name: str, vocab_size: int, hidden_size: int, *, axis: str
) -> bool:
    """Whether the checkpoint holds a head's weight in groups of few bits that the format keeps."""
    shard = Sharding.over(context.comms.axes[axis]).padded(0)
    shape = (vocab_size, hidden_size)
    return context.format.keeps_groups(context.weights, f"{name}.weight", shape, shard)


class LMHead:
    """Hidden states, replicated over tp -> logits (core.interfaces.model.OutputHead).

    Cut over `axis`: with "world" all ranks share one head, and compute the rows of all DP ranks;
    with "tp" each DP rank has a head of its own.
    """

    __slots__ = (
        "_dp",
        "_gather_columns",
        "_kernel",
        "_vocab_size",
        "part",
    )

    def __init__(
        self,
        context: BuildContext,
        weight_LE: Tensor,
        vocab_size: int,
        *,
        axis: str,
        quantized: bool = False,
    ) -> None:
        """`quantized`: see `is_quantized`."""
        self._kernel = context.ops.logits(weight_LE, quantized=quantized)
        comm = context.comms.axes[axis]
        self._gather_columns = context.comms.bridge(axis, src=Layout.COLUMNS, dst=Layout.REPLICATED)
        shared = axis == "world"
        self._dp = context.comms.axes["dp"] if shared else SoloCommunicator()
        self._vocab_size = vocab_size
        first, stop = Sharding.over(comm).padded(0).bounds(vocab_size)
        self.part = VocabularyPart(comm, first, stop - first)

    @classmethod
    def from_checkpoint(
        cls, context: BuildContext, name: str, vocab_size: int, hidden_size: int
    ) -> "LMHead":
        """A head with a weight of its own, instead of the embedding's, over `context.head_axis`."""
        axis = context.head_axis
        shard = Sharding.over(context.comms.axes[axis]).padded(0)
        weight_LE = context.weights.take(f"{name}.weight", (vocab_size, hidden_size), shard)
        quantized = is_quantized(context, name, vocab_size, hidden_size, axis=axis)
        return cls(context, weight_LE, vocab_size, axis=axis, quantized=quantized)

    def partial(self, hidden_RE: Tensor, rows: StepRows) -> Tensor:
        """(R, E) -> (A, L) in float32. `rows` counts R of every DP rank."""
        hidden_AE = gather_rows(self._dp, hidden_RE, self._counts(rows, hidden_RE.shape[0]))
        if hidden_AE.shape[0] == 0:  # the same on all ranks that share the head
            return hidden_RE.new_empty((0, self._vocab_size), dtype=torch.float32)
        return self._kernel(hidden_AE)

    def whole(self, partial_AL: Tensor, rows: StepRows) -> Tensor:
        """(A, L) -> (R, V)."""
        if partial_AL.shape[0] == 0:
            return partial_AL
        return self._own(self._gather_columns(partial_AL), rows)[:, : self._vocab_size]

    def best(self, partial_AL: Tensor, rows: StepRows, find: BestTokens) -> Tensor:
        """(A, L) -> (R,): of each rank's columns only the best travel."""
        part = self.part
        parts_AX2 = find.best_parts(partial_AL, part.first_id, part.num_tokens)
        parts_NAX2 = part.comm.all_gather(parts_AX2, 0).view(part.comm.size, *parts_AX2.shape)
        return self._own(find.best_of_parts(parts_NAX2), rows)

    def _own(self, of_all_A: Tensor, rows: StepRows) -> Tensor:
        """This DP rank's rows."""
        counts = self._counts(rows, of_all_A.shape[0])
        first = sum(counts[: self._dp.rank])
        return of_all_A[first : first + counts[self._dp.rank]]

    def _counts(self, rows: StepRows, num_rows: int) -> tuple[int, ...]:
        """Rows of the DP ranks that share the head."""
        return rows.by_dp if self._dp.size > 1 else (num_rows,)

    def __call__(self, hidden_RE: Tensor, rows: StepRows) -> Tensor:
        """(R, E) -> (R, V) in float32."""
        return self.whole(self.partial(hidden_RE, rows), rows)
