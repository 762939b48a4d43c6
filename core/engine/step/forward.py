"""Computes a step of one rank up to its logits: stage, forward, output head; launched eagerly.

`Steps` is what the runner calls; core.engine.step.decode_graphs replays captured steps behind the
same interface. Knows nothing of sampling. Shape legend: T tokens of the step, R rows that sample, V
vocabulary, L the columns of it that a rank has, E hidden size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from torch import Tensor, UntypedStorage

from core.engine.step.batch import Batch, Ints, SamplingRows, SlotState, stage
from core.engine.step.progress import Progress
from core.errors import PluginError
from core.interfaces.messages import ScheduledStep, StepFacts
from core.interfaces.model import CutHead, Model, ModelStep, WantedRows
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows

OnCaptured = Callable[[int, int], None]  # steps captured so far, and of all
LogitsOf = Callable[[], Tensor]


class AttentionOfRank(Protocol):
    """The caches and attention backends of a rank (core.engine.step.attention)."""

    progress: Progress  # counts the layers whose attention was computed

    @property
    def pool(self) -> UntypedStorage:
        """The memory of all layers' caches."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether steps without prompts may be recorded in a CUDA graph."""
        ...

    @property
    def prompts_capturable(self) -> bool:
        """Whether steps with prompts may be."""
        ...

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep: ...


@dataclass(slots=True)
class ComputedStep:
    """A step whose logits are under way. Its tensors hold until the next step is computed."""

    hidden_TE: Tensor | None  # of all tokens; None where rows were left out or replayed
    # Of the step's rows that sample, float32 (R, V). May exchange parts of them: every rank of tp
    # calls it for the same steps, once.
    logits: LogitsOf
    # Of the same rows what this rank has, (R, L). Not where DP ranks share the output head: there
    # a rank's columns are those of all DP ranks' rows.
    columns: LogitsOf
    best_R: Tensor | None  # int64: greedy tokens, stored already; None: nothing was chosen
    slots: Ints  # of those rows, on the host
    positions: Ints  # of the tokens to choose, on the host
    store: Callable[[Tensor], None]  # writes ids (R,) where the next step reads them


class Steps(Protocol):
    """Computes steps. Every rank of all DP ranks calls this for the same steps."""

    @property
    def graph_bytes(self) -> int:
        """Memory that captured steps hold on the device."""
        ...

    def capture(self, on_captured: OnCaptured) -> None:
        """Record what can be, before the first request; every rank calls this. Leaves tokens,
        pages and caches as they are."""
        ...

    @property
    def num_captures(self) -> int:
        """How many steps `capture` records."""
        ...

    @property
    def most_prompt_rows(self) -> int:
        """Rows of the largest step with prompts that `capture` records; 0: it records none."""
        ...

    def rehearse(self) -> None:
        """Launch what `capture` would record, without recording it."""
        ...

    def describe(self) -> str:
        """Which steps are captured, for the start-up summary."""
        ...

    def compute(self, scheduled: ScheduledStep, facts: StepFacts) -> ComputedStep: ...

    def logits(self, hidden_RE: Tensor, by_dp: Sequence[int]) -> Tensor:
        """Logits of any rows, of which DP ranks have `by_dp`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What the steps of a rank are computed with."""

    model: Model
    attention: AttentionOfRank
    state: SlotState
    plan: Plan
    rank: int
    stream: Layout  # as the model was built with

    @property
    def shares_head(self) -> bool:
        """Whether several DP ranks share the output head. All of them then gather logits where one
        needs more than the best tokens."""
        if self.plan.dp == 1:
            return False
        head = self.model.head
        if not isinstance(head, CutHead):
            return not self.plan.dp_lm_head
        return head.part.comm.size > self.plan.axis_size("tp")

    def rows(self, by_dp: Sequence[int]) -> StepRows:
        """Rows of one step as this rank sees them."""
        return StepRows(self.plan, self.rank, tuple(by_dp))

    def forward(
        self, batch: Batch, rows: StepRows, phase: str, wanted: WantedRows | None = None
    ) -> Tensor:
        """Final hidden states of a staged step: of all its rows, or of those that are wanted."""
        step = dataclasses.replace(self.attention.step(batch, rows, phase), wanted=wanted)
        hidden = self.model.forward(batch.input_ids_T, batch.positions_T, step)
        expected = (batch.input_ids_T if wanted is None else wanted.index_R).shape[0]
        if hidden.shape[0] != expected:
            raise PluginError(
                f"{type(self.model).__name__}.forward returned {hidden.shape[0]} rows of hidden "
                f"states where {expected} are wanted: those of ModelStep.wanted, or all where that "
                "is None (core.interfaces.model); the plugin of this model has to be changed"
            )
        return hidden

    def wanted(self, index_R: Tensor, num_real: Tensor, by_dp: Sequence[int]) -> WantedRows | None:
        """The only rows of a step that are read, `by_dp` of each DP rank. None where ranks share
        out a DP rank's rows, who would have to agree on other parts: all are computed."""
        if self.stream is Layout.ROWS and self.plan.tp_attn > 1:
            return None
        return WantedRows(index_R, self.rows(by_dp), num_real)


class EagerSteps:
    """Launches every kernel of every step; `reason` says to people why."""

    graph_bytes = 0
    num_captures = 0
    most_prompt_rows = 0

    def __init__(self, parts: RankParts, reason: str) -> None:
        self._parts = parts
        self._reason = reason

    def capture(self, on_captured: OnCaptured) -> None:
        """Nothing to record."""

    def rehearse(self) -> None:
        """Nothing to launch."""

    def describe(self) -> str:
        """The reason."""
        return f"off: {self._reason}"

    def compute(self, scheduled: ScheduledStep, facts: StepFacts) -> ComputedStep:
        """Any step."""
        parts = self._parts
        parts.state.update(scheduled)
        rows = parts.rows(facts.rows)
        cut = parts.stream is Layout.ROWS
        batch, sampling = stage(scheduled, parts.state, rows.num_padded if cut else rows.num_real)
        wanted = self._wanted(sampling, facts)
        phase = "prefill" if facts.has_prefill else "decode"
        hidden_TE = parts.forward(batch, rows, phase, wanted)
        chosen_RE = hidden_TE
        if wanted is not None:
            chosen_RE = hidden_TE[: len(sampling.slots)]
        elif len(sampling.slots) != hidden_TE.shape[0]:
            chosen_RE = hidden_TE[sampling.last_R]
        whole, columns = self._logits_of(chosen_RE, facts.samples)

        def store(ids_R: Tensor) -> None:
            tokens_SL = parts.state.tokens_SL
            tokens_SL[sampling.slots_R, sampling.positions_R] = ids_R.to(tokens_SL.dtype)

        all_TE = hidden_TE if wanted is None else None
        return ComputedStep(all_TE, whole, columns, None, sampling.slots, sampling.positions, store)

    def logits(self, hidden_RE: Tensor, by_dp: Sequence[int]) -> Tensor:
        """Eagerly."""
        head, rows = self._parts.model.head, self._parts.rows(by_dp)
        return head.whole(head.partial(hidden_RE, rows), rows)

    def _logits_of(self, chosen_RE: Tensor, by_dp: Sequence[int]) -> tuple[LogitsOf, LogitsOf]:
        """`ComputedStep.logits` and `.columns` of the rows that sample."""
        if not any(by_dp):
            return (known(chosen_RE.new_empty((0, 0))),) * 2
        head, rows = self._parts.model.head, self._parts.rows(by_dp)
        logits_AL = head.partial(chosen_RE, rows)
        if self._parts.shares_head:
            return known(head.whole(logits_AL, rows)), known(logits_AL)
        return partial(head.whole, logits_AL, rows), known(logits_AL)

    def _wanted(self, sampling: SamplingRows, facts: StepFacts) -> WantedRows | None:
        """Rows that sample, in steps with prompts, which have others; of a DP rank where none
        samples its first one, as kernels are not made for no rows."""
        if not facts.has_prefill or any(facts.logprob_rows):
            return None
        by_dp = [
            max(count, min(rows, 1)) for count, rows in zip(facts.samples, facts.rows, strict=True)
        ]
        index_R = sampling.last_R
        if not len(sampling.slots):
            index_R = index_R.new_zeros(self._parts.rows(by_dp).num_real)
        return self._parts.wanted(index_R, sampling.num_chosen, by_dp)


def known(logits: Tensor) -> LogitsOf:
    """Logits that are there already."""
    return lambda: logits


def row_starts(scheduled: ScheduledStep) -> list[int]:
    """The first token of each row of a step among the step's tokens."""
    ends = np.cumsum(np.array(scheduled.lengths, dtype=np.int64))
    return [end - length for end, length in zip(ends.tolist(), scheduled.lengths, strict=True)]
