"""Replays steps with prompts that were recorded as CUDA graphs, for some numbers of rows.

Where a step's kernels take less time than the host takes to launch them, as with few prompt tokens
or many small experts, the first token waits for the host. A recorded step has T rows of at most
MOST_SEQUENCES sequences, decodes among them; fewer are padded. Larger steps, and those whose prompt
logprobs are wanted, are left to other steps. Knows nothing of scheduling.

With several DP ranks all replay the same size, that of the one with most rows, also those that only
decode and those without rows; they agree on most rows and most sequences before the step.

Shape legend: see core.ops.stage.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from core.engine.step.batch import Batch, send
from core.engine.step.forward import ComputedStep, LogitsOf, OnCaptured, RankParts, Steps, known
from core.engine.step.input import StepInput, send_prompts
from core.engine.step.recorder import Recorder, Replay
from core.interfaces.attention import SequenceBatch
from core.interfaces.messages import ScheduledStep, StepFacts
from core.ops.stage import PromptRows, Staging, packed_prompts_length
from core.parallel.rows import StepRows

MOST_SEQUENCES = 32
# Rows of padding of all DP ranks together, where there are fewer real ones: they travel like these,
# and more of them cost more than launching does.
MOST_PADDING = 2048
_SIZES = (64, 128, 192, 256, *range(384, 1025, 128))


def prompt_sizes(most_rows: int, multiple: int = 1) -> list[int]:
    """Numbers of rows to capture, rising; empty below the least. `multiple`: of ranks that share
    out the rows of a step."""
    sizes = [*_SIZES, *range(1280, most_rows + 1, 256)]
    return sorted({-(-size // multiple) * multiple for size in sizes if size <= most_rows})


def padding_pays(size: int, by_dp: Sequence[int]) -> bool:
    """Whether ranks that have `by_dp` rows had better replay a step of `size` rows each."""
    total = sum(by_dp)
    return size * len(by_dp) - total <= max(total, MOST_PADDING)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A size that can be replayed: to this rank's part of the logits and best ids (S,)."""

    rows: PromptRows
    replay: Replay


class PromptGraphs:
    """Replays the steps it captured, and has `rest` compute the others."""

    graph_bytes = 0  # counted by GraphedSteps, whose decodes share the memory

    def __init__(
        self,
        parts: RankParts,
        rest: Steps,
        *,
        sizes: Sequence[int],
        num_sequences: int,
        max_model_len: int,
        staging: Staging,
        recorder: Recorder,
    ) -> None:
        self._parts, self._rest = parts, rest
        self._staging, self._recorder = staging, recorder
        self._max_model_len, self._sizes = max_model_len, tuple(sizes)
        state, most = parts.state, self._sizes[-1]
        device = state.device
        self._input = StepInput(packed_prompts_length(num_sequences), device)
        self._ids_T, self._positions_T, self._kv_slots_T = torch.zeros(
            (3, most), dtype=torch.int64, device=device
        )
        self._last_S = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self._table_SM = torch.zeros(
            (num_sequences, state.pages_SM.shape[1]), dtype=torch.int32, device=device
        )
        self._captured: dict[int, _Captured] = {}

    @torch.inference_mode()
    def capture(self, on_captured: OnCaptured) -> None:
        """Record every size, the largest first; no row of what runs meanwhile is real."""
        self._input.clear()
        for done, size in enumerate(reversed(self._sizes), start=1):
            rows = self._rows(size)
            self._captured[size] = _Captured(rows, self._recorder.record(partial(self._run, rows)))
            on_captured(done, len(self._sizes))

    @property
    def num_captures(self) -> int:
        return len(self._sizes)

    @property
    def most_prompt_rows(self) -> int:
        return self._sizes[-1]

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Every size. Leaves what `capture` leaves."""
        self._input.clear()
        for size in self._sizes:
            self._run(self._rows(size))

    def describe(self) -> str:
        """For the start-up summary."""
        return f"{len(self._sizes)} steps with prompts, of up to {self._sizes[-1]} tokens"

    def compute(self, scheduled: ScheduledStep, facts: StepFacts) -> ComputedStep:
        """Any step; replayed where its size was captured."""
        captured = self._captured_for(facts)
        if captured is None:
            return self._rest.compute(scheduled, facts)
        rows, state = captured.rows, self._parts.state
        state.update(scheduled)
        slots, contexts = send_prompts(self._input, scheduled, rows)
        logits_SL, best_S = captured.replay()
        count = len(slots)
        whole = self._whole(logits_SL, best_S.shape[0], facts)
        if all(scheduled.samples):

            def store(ids_R: Tensor) -> None:
                self._staging.store(ids_R, rows.places, state.tokens_SL)

            return ComputedStep(
                None,
                lambda: whole()[:count],
                lambda: logits_SL[:count],
                best_S[:count],
                slots,
                contexts,
                store,
            )
        chosen = np.flatnonzero(scheduled.samples)
        (chosen_R,) = send(state.device, chosen)

        def store_chosen(ids_R: Tensor) -> None:
            ids_S = best_S.index_copy(0, chosen_R, ids_R)
            self._staging.store(ids_S, rows.places, state.tokens_SL)

        return ComputedStep(
            None,
            lambda: whole()[chosen_R],
            lambda: logits_SL[chosen_R],
            best_S[chosen_R],
            slots[chosen],
            contexts[chosen],
            store_chosen,
        )

    def logits(self, hidden_RE: Tensor, by_dp: Sequence[int]) -> Tensor:
        """Eagerly."""
        return self._rest.logits(hidden_RE, by_dp)

    def _captured_for(self, facts: StepFacts) -> _Captured | None:
        """The same on all ranks."""
        most = max(facts.rows)
        if not facts.has_prefill or any(facts.logprob_rows) or most > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, most)]
        if facts.most_sequences > self._last_S.shape[0] or not padding_pays(size, facts.rows):
            return None
        return self._captured.get(size)

    def _whole(self, logits_AL: Tensor, num_rows: int, facts: StepFacts) -> LogitsOf:
        """Gathers this rank's logits; where others need theirs from it, that is done now."""
        whole = partial(self._parts.model.head.whole, logits_AL, self._rows_of_all(num_rows))
        if not self._parts.shares_head or facts.best_only:
            return whole
        return known(whole())

    def _rows_of_all(self, num_rows: int) -> StepRows:
        """So many rows of every DP rank."""
        return self._parts.rows([num_rows] * self._parts.plan.dp)

    def _rows(self, size: int) -> PromptRows:
        return PromptRows(
            self._input.packed,
            self._ids_T[:size],
            self._positions_T[:size],
            self._kv_slots_T[:size],
            self._last_S,
            self._table_SM,
        )

    def _run(self, rows: PromptRows) -> tuple[Tensor, Tensor]:
        """What a graph holds. Returns this rank's part of the logits and the best token of each
        sequence's last row."""
        parts, state = self._parts, self._parts.state
        num_rows, size = rows.input_ids_T.shape[0], rows.num_sequences
        self._staging.stage_prompts(rows, state.tokens_SL, state.pages_SM, state.page_size)
        # Any sequence may be the long one; the sum is what bounds grids.
        sequences = SequenceBatch(
            query_lens=[num_rows - size + 1] + [1] * (size - 1),
            context_lens=[self._max_model_len] * size,
            query_starts_S1=rows.starts_S1,
            context_lens_S=rows.field(1),
            page_table_SM=rows.page_table_SM,
        )
        batch = Batch(
            input_ids_T=rows.input_ids_T,
            positions_T=rows.positions_T,
            kv_slots_T=rows.kv_slots_T,
            num_real=rows.num_real,
            num_decodes=0,
            decode=None,
            prefill=sequences,
        )
        head_rows = self._rows_of_all(size)
        wanted = parts.wanted(rows.last_S, rows.num_real_sequences, head_rows.by_dp)
        hidden_SE = parts.forward(batch, self._rows_of_all(num_rows), "prefill", wanted)
        if wanted is None:
            hidden_SE = hidden_SE[rows.last_S]
        head = parts.model.head
        logits_SL = head.partial(hidden_SE, head_rows)
        best_S = head.best(logits_SL, head_rows, self._staging)
        self._staging.store(best_S, rows.places, state.tokens_SL)
        return logits_SL, best_S
