"""Token embedding and output head, cut along the vocabulary over ranks.

The vocabulary is padded with zero rows so that any number of ranks divides it; ids and logits
past its end never occur outside of this file. Shape legend: T rows, R rows whose logits are wanted,
E hidden size, V vocabulary, L this rank's part of the padded vocabulary, A rows of all DP ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.comm import SoloCommunicator
from core.interfaces.model import BuildContext
from core.kernels.ragged import gather_rows
from core.layers.row_exchange import row_exchange
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


class LMHead:
    """Hidden states, replicated over tp -> logits of the whole vocabulary on the same ranks.

    Cut over `axis`: with "world" all ranks share one head, and compute the rows of all DP ranks;
    with "tp" each DP rank has a head of its own.
    """

    __slots__ = ("_dp", "_gather_columns", "_kernel", "_vocab_size")

    def __init__(
        self, context: BuildContext, weight_LE: Tensor, vocab_size: int, *, axis: str
    ) -> None:
        self._kernel = context.ops.logits(weight_LE)
        self._gather_columns = context.comms.bridge(axis, src=Layout.COLUMNS, dst=Layout.REPLICATED)
        shared = axis == "world"
        self._dp = context.comms.axes["dp"] if shared else SoloCommunicator()
        self._vocab_size = vocab_size

    @classmethod
    def from_checkpoint(
        cls, context: BuildContext, name: str, vocab_size: int, hidden_size: int
    ) -> "LMHead":
        """A head with a weight of its own, instead of the embedding's, over `context.head_axis`."""
        axis = context.head_axis
        shard = Sharding.over(context.comms.axes[axis]).padded(0)
        weight_LE = context.weights.take(f"{name}.weight", (vocab_size, hidden_size), shard)
        return cls(context, weight_LE, vocab_size, axis=axis)

    def __call__(self, hidden_RE: Tensor, rows: StepRows) -> Tensor:
        """(R, E) -> (R, V) in float32. `rows` counts R of every DP rank."""
        counts = rows.by_dp if self._dp.size > 1 else (hidden_RE.shape[0],)
        hidden_AE = gather_rows(self._dp, hidden_RE, counts)
        if hidden_AE.shape[0] == 0:  # the same on all ranks that share the head
            return hidden_RE.new_empty((0, self._vocab_size), dtype=torch.float32)
        logits_AV = self._gather_columns(self._kernel(hidden_AE))
        first = sum(counts[: self._dp.rank])
        return logits_AV[first : first + hidden_RE.shape[0], : self._vocab_size]
