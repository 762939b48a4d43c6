"""Runs one step of one rank: stage, forward, sample. Knows nothing of scheduling or sockets.

Every rank of an attention group runs the same AgreedStep, also one without rows of its own. The
sampled ids come from rank 0 of the tp axis and are broadcast, so ranks cannot diverge. Shape
legend: T tokens of the step, R rows whose logits are wanted, V vocabulary, E hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.engine.batch import Batch, SlotState, stage, to_device
from core.engine.expert_balance import Balancer
from core.engine.logprobs import DeviceLogprobs, prompt_logprobs, sampled_logprobs
from core.engine.sampler import Sampler
from core.interfaces.comm import Communicator
from core.interfaces.messages import (
    AgreedStep,
    SlotInit,
    StepFacts,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from core.interfaces.model import Model, ModelStep
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows

# Prompt logprobs need logits of every position; so many rows at a time bound their memory.
PROMPT_LOGPROB_ROWS = 256


@dataclass(slots=True)
class PendingStep:
    """A step that was launched; `to_host` waits for the device."""

    ids_R: Tensor
    logprobs: DeviceLogprobs | None = None
    logprob_rows: list[int] = field(default_factory=list)  # indices into ids_R
    prompt_logprobs: dict[int, list[DeviceLogprobs]] = field(default_factory=dict)

    def copy_async(self) -> "PendingStep":
        """The same in pinned host memory: valid once the stream got this far."""
        return PendingStep(
            self.ids_R.to("cpu", non_blocking=True),
            self.logprobs and self.logprobs.copy_async(),
            self.logprob_rows,
            {
                row: [piece.copy_async() for piece in pieces]
                for row, pieces in self.prompt_logprobs.items()
            },
        )

    def to_host(self) -> StepResult:
        """Ids and logprobs as plain values; waits for the device where they are there."""
        chosen: dict[int, TokenLogprobs] = {}
        if self.logprobs is not None:
            chosen = dict(zip(self.logprob_rows, self.logprobs.to_host(), strict=True))
        prompts = {
            row: [entry for piece in pieces for entry in piece.to_host()]
            for row, pieces in self.prompt_logprobs.items()
        }
        return StepResult(token_ids=self.ids_R.tolist(), logprobs=chosen, prompt_logprobs=prompts)


class AttentionOfRank(Protocol):
    """The caches and attention backends of a rank (core.engine.step_attention)."""

    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep: ...


class ModelRunner:
    """One rank's model, caches and sampler, stepped by what the DP ranks agreed on."""

    def __init__(
        self,
        *,
        model: Model,
        attention: AttentionOfRank,
        sampler: Sampler,
        state: SlotState,
        comm: Communicator,
        plan: Plan,
        rank: int,
        stream: Layout,
        balancer: Balancer,
    ) -> None:
        """`comm` is that of the tp axis; `stream` as the model was built with."""
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self.state = state
        self.comm = comm
        self.plan = plan
        self.rank = rank
        self.stream = stream
        self.balancer = balancer
        self.slots: dict[int, SlotInit] = {}  # the request in each slot

    @torch.inference_mode()
    def launch(self, step: AgreedStep) -> PendingStep:
        """Start a step. On a GPU this returns before the device is done."""
        plan, facts = step.plan, step.facts
        for init in plan.inits:
            self.slots[init.slot] = init
        self.sampler.init_slots(plan.inits)
        self.state.update(plan)
        rows = self._rows(facts.rows)
        cut = self.stream is Layout.ROWS
        batch = stage(plan, self.state, rows.num_padded if cut else rows.num_real)
        hidden_TE = self.model.forward(
            batch.input_ids_T,
            batch.positions_T,
            self.attention.step(batch, rows, "prefill" if facts.has_prefill else "decode"),
        )
        pending = PendingStep(torch.empty(0, dtype=torch.int64, device=hidden_TE.device))
        self._prompt_logprobs(plan, facts, batch, hidden_TE, pending)
        if any(facts.samples):
            self._sample(plan, facts, batch, hidden_TE, pending)
        self.balancer.after_step()
        return pending

    def _rows(self, by_dp: Sequence[int]) -> StepRows:
        return StepRows(self.plan, self.rank, tuple(by_dp))

    def _sample(
        self,
        plan: StepPlan,
        facts: StepFacts,
        batch: Batch,
        hidden_TE: Tensor,
        pending: PendingStep,
    ) -> None:
        """Choose the next token of each sampling row and store it where the next step reads."""
        rows = [row for row, samples in enumerate(plan.samples) if samples]
        slots = [plan.slots[row] for row in rows]
        positions = [plan.starts[row] + plan.lengths[row] for row in rows]
        packed = np.array([batch.row_ends[rows] - 1, slots, positions], dtype=np.int64)
        last_R, slots_R, positions_R = to_device(packed, self.state.device)
        if len(rows) != hidden_TE.shape[0]:
            hidden_TE = hidden_TE[last_R]
        logits_RV = self.model.logits(hidden_TE, self._rows(facts.samples))
        if not rows:
            return
        if self.comm.rank == 0:
            sample_plan = self.sampler.plan(slots, positions)
            pending.ids_R = self.sampler.sample(sample_plan, logits_RV, self.state.tokens_SL)
            self._sampled_logprobs(slots, logits_RV, pending)
        else:
            pending.ids_R = torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device)
        pending.ids_R = self.comm.broadcast(pending.ids_R, 0)
        self.state.tokens_SL[slots_R, positions_R] = pending.ids_R.to(torch.int32)

    def _sampled_logprobs(self, slots: list[int], logits_RV: Tensor, pending: PendingStep) -> None:
        wanted = [self.slots[slot].sampling.logprobs for slot in slots]
        pending.logprob_rows = [index for index, top in enumerate(wanted) if top is not None]
        if pending.logprob_rows:
            pending.logprobs = sampled_logprobs(logits_RV, pending.ids_R, wanted)

    def _prompt_logprobs(
        self,
        plan: StepPlan,
        facts: StepFacts,
        batch: Batch,
        hidden_TE: Tensor,
        pending: PendingStep,
    ) -> None:
        """Logprobs of the prompt tokens that follow each computed prompt position.

        The positions of all rows are taken together, a piece at a time: every DP rank computes
        equally many pieces, some of them perhaps without a row.
        """
        most = max(facts.logprob_rows)
        if most == 0:
            return
        wanted = self._prompt_positions(plan, batch)
        assert len(wanted) == plan.num_logprob_rows, (len(wanted), plan.num_logprob_rows)
        for first in range(0, most, PROMPT_LOGPROB_ROWS):
            counts = [min(max(n - first, 0), PROMPT_LOGPROB_ROWS) for n in facts.logprob_rows]
            piece = wanted[first : first + PROMPT_LOGPROB_ROWS]
            packed = np.array([w[1:] for w in piece], dtype=np.int64).reshape(-1, 3).T
            at_R, slots_R, next_R = to_device(np.ascontiguousarray(packed), self.state.device)
            logits_RV = self.model.logits(hidden_TE[at_R], self._rows(counts))
            if self.comm.rank == 0 and piece:
                next_ids = self.state.tokens_SL[slots_R, next_R].long()
                self._keep_prompt_logprobs(plan, piece, logits_RV, next_ids, pending)

    def _prompt_positions(self, plan: StepPlan, batch: Batch) -> list[tuple[int, int, int, int]]:
        """(row of the plan, row of the hidden states, slot, position of the token predicted)."""
        wanted = []
        for row in range(plan.num_decodes, len(plan.slots)):
            init = self.slots[plan.slots[row]]
            if init.sampling.prompt_logprobs is None:
                continue
            start, length = plan.starts[row], plan.lengths[row]
            first = int(batch.row_ends[row]) - length
            # The last prompt position predicts the first answer token, which is not a prompt's.
            count = min(length, init.num_prompt - 1 - start)
            wanted += [(row, first + i, init.slot, start + i + 1) for i in range(count)]
        return wanted

    def _keep_prompt_logprobs(
        self,
        plan: StepPlan,
        piece: Sequence[tuple[int, int, int, int]],
        logits_RV: Tensor,
        next_ids: Tensor,
        pending: PendingStep,
    ) -> None:
        start = 0
        for row, members in itertools.groupby(piece, key=lambda w: w[0]):
            stop = start + len(list(members))
            top = self.slots[plan.slots[row]].sampling.prompt_logprobs
            assert top is not None
            pending.prompt_logprobs.setdefault(row, []).append(
                prompt_logprobs(logits_RV[start:stop], next_ids[start:stop], top)
            )
            start = stop
