"""Runs one step of one rank: stage, forward, sample. Knows nothing of scheduling or sockets.

Every rank of a group runs the same StepPlan. The sampled ids come from rank 0 of the tp axis
and are broadcast, so ranks cannot diverge. Shape legend: T tokens of the step, R rows whose
logits are wanted, V vocabulary, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from core.engine.batch import Batch, SlotState, stage, to_device
from core.engine.logprobs import DeviceLogprobs, prompt_logprobs, sampled_logprobs
from core.engine.sampler import Sampler
from core.interfaces.attention import AttentionBackend, LayerKV, SequenceBatch
from core.interfaces.comm import Communicator
from core.interfaces.messages import SlotInit, StepPlan, StepResult, TokenLogprobs
from core.interfaces.model import Model
from core.interfaces.ops import Ops

# Prompt logprobs need logits of every position; so many rows at a time bound their memory.
PROMPT_LOGPROB_ROWS = 256


class StepAttention:
    """Attention of one step: writes the cache, then runs each phase on its own rows."""

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerKV],
        kv_slots_T: Tensor,
        phases: Sequence[tuple[AttentionBackend, SequenceBatch, slice]],
    ) -> None:
        self.ops = ops
        self.caches = caches
        self.kv_slots_T = kv_slots_T
        self.phases = [(backend, backend.plan(batch), rows) for backend, batch, rows in phases]

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        cache = self.caches[layer]
        self.ops.write_kv(k_TGD, v_TGD, cache.k_NPGD, cache.v_NPGD, self.kv_slots_T)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for backend, plan, rows in self.phases:
            backend.forward(plan, cache, q_THD[rows], out_THD[rows])
        return out_THD


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


class ModelRunner:
    """One rank's model, caches and sampler, stepped by plans."""

    def __init__(
        self,
        *,
        model: Model,
        ops: Ops,
        caches: Sequence[LayerKV],
        prefill: AttentionBackend,
        decode: AttentionBackend,
        sampler: Sampler,
        state: SlotState,
        comm: Communicator,
    ) -> None:
        self.model = model
        self.ops = ops
        self.caches = caches
        self.prefill = prefill
        self.decode = decode
        self.sampler = sampler
        self.state = state
        self.comm = comm
        self.slots: dict[int, SlotInit] = {}  # the request in each slot

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. On a GPU this returns before the device is done."""
        for init in plan.inits:
            self.slots[init.slot] = init
        self.sampler.init_slots(plan.inits)
        self.state.update(plan)
        batch = stage(plan, self.state)
        hidden_TE = self.model.forward(
            batch.input_ids_T, batch.positions_T, self._attention(plan, batch)
        )
        step = PendingStep(torch.empty(0, dtype=torch.int64, device=hidden_TE.device))
        self._prompt_logprobs(plan, batch, hidden_TE, step)
        rows = [row for row, samples in enumerate(plan.samples) if samples]
        if rows:
            self._sample(plan, batch, rows, hidden_TE, step)
        return step

    def _attention(self, plan: StepPlan, batch: Batch) -> StepAttention:
        phases: list[tuple[AttentionBackend, SequenceBatch, slice]] = []
        if batch.decode is not None:
            phases.append((self.decode, batch.decode, slice(0, plan.num_decodes)))
        if batch.prefill is not None:
            phases.append((self.prefill, batch.prefill, slice(plan.num_decodes, None)))
        return StepAttention(self.ops, self.caches, batch.kv_slots_T, phases)

    def _sample(
        self, plan: StepPlan, batch: Batch, rows: list[int], hidden_TE: Tensor, step: PendingStep
    ) -> None:
        """Choose the next token of each sampling row and store it where the next step reads."""
        slots = [plan.slots[row] for row in rows]
        positions = [plan.starts[row] + plan.lengths[row] for row in rows]
        packed = np.array([batch.row_ends[rows] - 1, slots, positions], dtype=np.int64)
        last_R, slots_R, positions_R = to_device(packed, self.state.device)
        if len(rows) != hidden_TE.shape[0]:
            hidden_TE = hidden_TE[last_R]
        logits_RV = self.model.logits(hidden_TE)
        if self.comm.rank == 0:
            sample_plan = self.sampler.plan(slots, positions)
            step.ids_R = self.sampler.sample(sample_plan, logits_RV, self.state.tokens_SL)
            self._sampled_logprobs(slots, logits_RV, step)
        else:
            step.ids_R = torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device)
        step.ids_R = self.comm.broadcast(step.ids_R, 0)
        self.state.tokens_SL[slots_R, positions_R] = step.ids_R.to(torch.int32)

    def _sampled_logprobs(self, slots: list[int], logits_RV: Tensor, step: PendingStep) -> None:
        wanted = [self.slots[slot].sampling.logprobs for slot in slots]
        step.logprob_rows = [index for index, top in enumerate(wanted) if top is not None]
        if step.logprob_rows:
            step.logprobs = sampled_logprobs(logits_RV, step.ids_R, wanted)

    def _prompt_logprobs(
        self, plan: StepPlan, batch: Batch, hidden_TE: Tensor, step: PendingStep
    ) -> None:
        """Logprobs of the prompt tokens that follow each computed prompt position."""
        for row in range(plan.num_decodes, len(plan.slots)):
            init = self.slots[plan.slots[row]]
            top = init.sampling.prompt_logprobs
            if top is None:
                continue
            start, length = plan.starts[row], plan.lengths[row]
            first = int(batch.row_ends[row]) - length
            # The last prompt position predicts the first answer token, which is not a prompt's.
            count = min(length, init.num_prompt - 1 - start)
            pieces = step.prompt_logprobs.setdefault(row, [])
            for done in range(0, count, PROMPT_LOGPROB_ROWS):
                size = min(PROMPT_LOGPROB_ROWS, count - done)
                logits_TV = self.model.logits(hidden_TE[first + done : first + done + size])
                next_at = start + done + 1
                next_ids = self.state.tokens_SL[init.slot, next_at : next_at + size].long()
                if self.comm.rank == 0:
                    pieces.append(prompt_logprobs(logits_TV, next_ids, top))
