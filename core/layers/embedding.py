"""Token embedding and output head, cut along the vocabulary over the tp axis.

The vocabulary is padded with zero rows so that any number of ranks divides it; ids and logits
past its end never occur outside of this file. Shape legend: T rows, R rows whose logits are wanted,
E hidden size, V vocabulary, L this rank's part of the padded vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from core.interfaces.model import BuildContext
from core.parallel.layout import Layout
from core.parallel.sharding import Sharding


class VocabEmbedding:
    """Ids -> vectors: each rank looks up the rows it has, the sum over ranks is the answer."""

    __slots__ = ("_lookup", "_reduce", "_start", "weight_LE")

    def __init__(self, context: BuildContext, name: str, vocab_size: int, hidden_size: int) -> None:
        shard = Sharding.over(context.comms.axes["tp"]).padded(0)
        shape = (vocab_size, hidden_size)
        self.weight_LE = context.weights.take(f"{name}.weight", shape, shard)
        self._start, stop = shard.bounds(vocab_size)
        holds_all = (self._start, stop) == (0, vocab_size)
        self._lookup = self._lookup_all if holds_all else self._lookup_part
        self._reduce = context.comms.bridge("tp", src=Layout.PARTIAL, dst=Layout.REPLICATED)

    def __call__(self, input_ids_T: Tensor) -> Tensor:
        return self._reduce(self._lookup(input_ids_T))

    def _lookup_all(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight_LE)

    def _lookup_part(self, input_ids_T: Tensor) -> Tensor:
        local_ids_T = input_ids_T - self._start
        elsewhere_T = (local_ids_T < 0) | (local_ids_T >= self.weight_LE.shape[0])
        hidden_TE = F.embedding(local_ids_T.masked_fill_(elsewhere_T, 0), self.weight_LE)
        return hidden_TE.masked_fill_(elsewhere_T.unsqueeze(1), 0)


class LMHead:
    """Hidden states -> logits of the whole vocabulary, on every rank."""

    __slots__ = ("_gather", "_kernel", "_vocab_size")

    def __init__(self, context: BuildContext, weight_LE: Tensor, vocab_size: int) -> None:
        self._kernel = context.ops.logits(weight_LE)
        self._gather = context.comms.bridge("tp", src=Layout.COLUMNS, dst=Layout.REPLICATED)
        self._vocab_size = vocab_size

    @classmethod
    def from_checkpoint(
        cls, context: BuildContext, name: str, vocab_size: int, hidden_size: int
    ) -> "LMHead":
        """A head with a weight of its own, instead of the embedding's."""
        shard = Sharding.over(context.comms.axes["tp"]).padded(0)
        weight_LE = context.weights.take(f"{name}.weight", (vocab_size, hidden_size), shard)
        return cls(context, weight_LE, vocab_size)

    def __call__(self, hidden_RE: Tensor) -> Tensor:
        """(R, E) -> (R, V) in float32."""
        return self._gather(self._kernel(hidden_RE))[:, : self._vocab_size]
