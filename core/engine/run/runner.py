"""Runs one step of one rank: compute, sample. Knows nothing of scheduling or sockets.

Every rank of an attention group runs the same AgreedStep, also one without rows of its own. Sampled
ids are exchanged (core.engine.sample.choosing), so that ranks cannot diverge.

Shape legend: T tokens of the step, R rows whose logits are wanted, V vocabulary, E hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from core.engine.run.expert_balance import ExpertBalancer
from core.engine.sample.choosing import Chooser
from core.engine.sample.logprobs import DeviceLogprobs, prompt_logprobs
from core.engine.sample.sampler import Sampler
from core.engine.step.batch import SlotState, to_device
from core.engine.step.forward import ComputedStep, Steps, row_starts
from core.engine.step.progress import Progress
from core.interfaces.comm import Communicator
from core.interfaces.messages import (
    AgreedStep,
    ScheduledStep,
    SlotInit,
    StepFacts,
    StepResult,
    TokenLogprobs,
)

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


class ModelRunner:
    """One rank's model, caches and sampler, stepped by what the DP ranks agreed on."""

    def __init__(
        self,
        *,
        steps: Steps,
        sampler: Sampler,
        chooser: Chooser,
        state: SlotState,
        comm: Communicator,
        expert_balancer: ExpertBalancer,
        progress: Progress,
        pool: UntypedStorage | None = None,
    ) -> None:
        """`comm` is that of the tp axis; `progress` also counts what is done before the sampler;
        `pool` is the memory of the caches."""
        self.steps = steps
        self.sampler = sampler
        self.chooser = chooser
        self.state = state
        self.comm = comm
        self.expert_balancer = expert_balancer
        self.progress = progress
        self.pool = pool
        self.slots: dict[int, SlotInit] = {}  # the request in each slot
        # By slot: alternatives wanted beside each token's logprob; -1: not even that.
        self._num_logprobs = np.full(state.tokens_SL.shape[0], -1, dtype=np.int64)

    @torch.inference_mode()
    def launch(self, step: AgreedStep) -> PendingStep:
        """Start a step. On a GPU this returns before the device is done."""
        scheduled, facts = step.scheduled, step.facts
        for init in scheduled.inits:
            wanted = init.sampling.logprobs
            self.slots[init.slot] = init
            self._num_logprobs[init.slot] = -1 if wanted is None else wanted
        self.sampler.init_slots(scheduled.inits)
        computed = self.steps.compute(scheduled, facts)
        pending = self._chosen(computed)
        self._prompt_logprobs(scheduled, facts, computed, pending)
        self.expert_balancer.after_step()
        return pending

    def _chosen(self, computed: ComputedStep) -> PendingStep:
        """The next token of each sampling row, stored where the next step reads it, and what was
        asked to be told of it. Every rank of tp decides alike whether best tokens are enough."""
        slots = computed.slots
        wanted = self._num_logprobs[slots]
        best_R = computed.best_R if self.sampler.is_greedy(slots) else None
        if best_R is not None and not (wanted >= 0).any():
            return PendingStep(best_R)
        if not len(slots):
            return PendingStep(torch.empty(0, dtype=torch.int64, device=self.state.device))
        each = [None if top < 0 else top for top in wanted.tolist()]
        ids_R, logprobs = self.chooser.choose(computed, best_R, each)
        pending = PendingStep(ids_R, logprobs)
        if logprobs is not None:
            pending.logprob_rows = [index for index, top in enumerate(each) if top is not None]
        return pending

    def _prompt_logprobs(
        self,
        scheduled: ScheduledStep,
        facts: StepFacts,
        computed: ComputedStep,
        pending: PendingStep,
    ) -> None:
        """Logprobs of the prompt tokens that follow each computed prompt position.

        The positions of all rows are taken together, a piece at a time: every DP rank computes
        equally many pieces, some of them perhaps without a row.
        """
        most = max(facts.logprob_rows)
        if most == 0:
            return
        hidden_TE = computed.hidden_TE
        assert hidden_TE is not None, "rows whose logprobs are wanted were left out"
        wanted = self._prompt_positions(scheduled)
        assert len(wanted) == scheduled.num_logprob_rows, (len(wanted), scheduled.num_logprob_rows)
        for first in range(0, most, PROMPT_LOGPROB_ROWS):
            counts = [min(max(n - first, 0), PROMPT_LOGPROB_ROWS) for n in facts.logprob_rows]
            piece = wanted[first : first + PROMPT_LOGPROB_ROWS]
            packed = np.array([w[1:] for w in piece], dtype=np.int64).reshape(-1, 3).T
            at_R, slots_R, next_R = to_device(np.ascontiguousarray(packed), self.state.device)
            logits_RV = self.steps.logits(hidden_TE[at_R], counts)
            if self.comm.rank == 0 and piece:
                next_ids = self.state.tokens_SL[slots_R, next_R].long()
                self._keep_prompt_logprobs(scheduled, piece, logits_RV, next_ids, pending)
            self.progress.pieces += 1

    def _prompt_positions(self, scheduled: ScheduledStep) -> list[tuple[int, int, int, int]]:
        """(row of the step, row of the hidden states, slot, position of the token predicted)."""
        wanted = []
        first_tokens = row_starts(scheduled)
        for row in range(scheduled.num_decodes, len(scheduled.slots)):
            init = self.slots[scheduled.slots[row]]
            if init.sampling.prompt_logprobs is None:
                continue
            start, length = scheduled.starts[row], scheduled.lengths[row]
            # The last prompt position predicts the first answer token, which is not a prompt's.
            count = min(length, init.num_prompt - 1 - start)
            wanted += [(row, first_tokens[row] + i, init.slot, start + i + 1) for i in range(count)]
        return wanted

    def _keep_prompt_logprobs(
        self,
        scheduled: ScheduledStep,
        piece: Sequence[tuple[int, int, int, int]],
        logits_RV: Tensor,
        next_ids: Tensor,
        pending: PendingStep,
    ) -> None:
        start = 0
        for row, members in itertools.groupby(piece, key=lambda w: w[0]):
            stop = start + len(list(members))
            top = self.slots[scheduled.slots[row]].sampling.prompt_logprobs
            assert top is not None
            pending.prompt_logprobs.setdefault(row, []).append(
                prompt_logprobs(logits_RV[start:stop], next_ids[start:stop], top)
            )
            start = stop
