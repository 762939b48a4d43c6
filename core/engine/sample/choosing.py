"""Who chooses the tokens of a step: one rank for all, from whole logits, or all ranks together.

A step's logits are cut over the ranks that share the output head. Where these are one attention
group (`RanksTogether`), each knows what is asked of every row, so that they choose without
gathering logits (core.engine.sample.cut_vocabulary), with the same tokens. Where DP ranks share a
head (`OneForAll`), a rank doesn't know the requests of the others' rows, of which it has columns:
logits are gathered, and so they are where that is all the same, on one rank, or of few rows
cheaper, or a request asked for a logits processor that needs whole rows.

Shape legend: R rows that choose a token.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from core.engine.sample.cut_vocabulary import CutVocabulary
from core.engine.sample.logprobs import DeviceLogprobs, sampled_logprobs
from core.engine.sample.sampler import Sampler
from core.engine.step.batch import SlotState
from core.engine.step.forward import ComputedStep
from core.interfaces.comm import Communicator
from core.interfaces.model import CutHead, OutputHead

# Of a step with at most so many, gathering takes less time than a draw's exchanges one after the
# other: 4 rows of a vocabulary of 128,256. Measured with gloo (benchmarks.cut_sampler).
FEW_LOGITS = 1 << 19

NumTop = Sequence[int | None]  # by row: alternatives wanted beside its logprob; None: not even that


class Chooser(Protocol):
    """Every rank of tp calls the same for the same step."""

    def choose(
        self, computed: ComputedStep, best_R: Tensor | None, num_top: NumTop
    ) -> tuple[Tensor, DeviceLogprobs | None]:
        """The ids (int64) of a step with rows, stored, and what rank 0 of tp has to tell of them.
        `best_R`: they are chosen and stored already; None: they are not."""
        ...


def make_chooser(
    sampler: Sampler,
    state: SlotState,
    comm: Communicator,
    head: OutputHead,
    *,
    shares_head: bool,
) -> Chooser:
    """`comm` is that of the tp axis; this DP rank may share `head` with others."""
    if shares_head or not isinstance(head, CutHead) or head.part.comm.size == 1:
        return OneForAll(sampler, state, comm)
    part = head.part
    assert part.comm.size == comm.size, "the head is cut over other ranks than those of tp"
    over = CutVocabulary(
        part.comm, sampler.vocab_size, first_id=part.first_id, num_tokens=part.num_tokens
    )
    return RanksTogether(sampler, state, comm, over)


class OneForAll:
    """Rank 0 of tp chooses from whole logits, and the others are told."""

    def __init__(self, sampler: Sampler, state: SlotState, comm: Communicator) -> None:
        self._sampler, self._state, self._comm = sampler, state, comm

    def choose(
        self, computed: ComputedStep, best_R: Tensor | None, num_top: NumTop
    ) -> tuple[Tensor, DeviceLogprobs | None]:
        """See Chooser."""
        logits_RV = computed.logits()
        ids_R = self._sampled(computed, logits_RV) if best_R is None else best_R
        if self._comm.rank > 0 or not _any_wanted(num_top):
            return ids_R, None
        return ids_R, sampled_logprobs(logits_RV, ids_R, num_top)

    def _sampled(self, computed: ComputedStep, logits_RV: Tensor) -> Tensor:
        if self._comm.rank == 0:
            batch = self._sampler.prepare(computed.slots, computed.positions)
            ids_R = self._sampler.sample(batch, logits_RV, self._state.tokens_SL)
        else:
            ids_R = torch.empty(len(computed.slots), dtype=torch.int64, device=logits_RV.device)
        ids_R = self._comm.broadcast(ids_R, 0)
        computed.store(ids_R)
        return ids_R


class RanksTogether:
    """Each rank does its columns' part; the last exchange gives all the same ids."""

    def __init__(
        self, sampler: Sampler, state: SlotState, comm: Communicator, over: CutVocabulary
    ) -> None:
        self._sampler, self._state, self._over = sampler, state, over
        self._tells = comm.rank == 0
        self._of_few = OneForAll(sampler, state, comm)

    def choose(
        self, computed: ComputedStep, best_R: Tensor | None, num_top: NumTop
    ) -> tuple[Tensor, DeviceLogprobs | None]:
        """See Chooser."""
        if self._gathers(computed):
            return self._of_few.choose(computed, best_R, num_top)
        logits_RL = computed.columns()
        ids_R = best_R
        if ids_R is None:
            batch = self._sampler.prepare(computed.slots, computed.positions, self._over)
            ids_R = self._sampler.sample(batch, logits_RL, self._state.tokens_SL)
            computed.store(ids_R)
        if not _any_wanted(num_top):
            return ids_R, None
        logprobs = sampled_logprobs(logits_RL, ids_R, num_top, self._over)
        return ids_R, logprobs if self._tells else None

    def _gathers(self, computed: ComputedStep) -> bool:
        if self._sampler.needs_whole_rows(computed.slots):
            return True
        num_logits = len(computed.slots) * self._sampler.vocab_size
        return num_logits <= FEW_LOGITS and self._sampler.draws(computed.slots)


def _any_wanted(num_top: NumTop) -> bool:
    return any(num is not None for num in num_top)
