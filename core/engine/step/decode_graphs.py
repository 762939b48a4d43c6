"""Replays decode steps that were recorded once as CUDA graphs, one for each of some batch sizes.

A recorded step of S rows is staging, the model, its output head, and the choice of greedy tokens,
in buffers that keep their addresses; all that changes is one packed input (core.ops.stage). A
step of fewer rows is padded. Steps that were not recorded run eagerly. Knows nothing of
scheduling, and of CUDA only in core.engine.step.recorder.

With several DP ranks all replay the same size at the same time, also those without rows.
Shape legend: see core.ops.stage.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.engine.step.batch import Batch
from core.engine.step.forward import (
    ComputedStep,
    EagerSteps,
    LogitsOf,
    OnCaptured,
    RankParts,
    Steps,
    known,
)
from core.engine.step.input import StepInput, send_decodes
from core.engine.step.prompt_graphs import MOST_SEQUENCES, PromptGraphs, prompt_sizes
from core.engine.step.recorder import Recorder, Replay
from core.interfaces.attention import SequenceBatch
from core.interfaces.comm import Comms
from core.interfaces.messages import ScheduledStep, StepFacts
from core.interfaces.moe_a2a import Dispatcher
from core.ops.stage import DecodeRows, Staging, packed_length
from core.parallel.layout import Layout
from core.settings.config import EngineConfig

DEFAULT_MOST_ROWS = 512


def graph_sizes(most_rows: int, multiple: int = 1) -> list[int]:
    """Numbers of rows to capture, rising: few rows are padded little. `multiple`: of ranks that
    share out the rows of a step."""
    steps = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most_rows + 1, 32)]
    sizes = [size for size in steps if size < most_rows] + [most_rows]
    return sorted({-(-size // multiple) * multiple for size in sizes})


def most_graph_rows(engine: EngineConfig) -> int:
    """The largest size to capture."""
    most = DEFAULT_MOST_ROWS if engine.max_graph_batch is None else engine.max_graph_batch
    return min(most, engine.running_limit)


def reason_for_eager(
    engine: EngineConfig,
    device: torch.device,
    *,
    attention: bool,
    dispatcher: Dispatcher | None,
    comms: Comms,
) -> str | None:
    """Why no step is captured, for people; None: decode steps are. `attention`: whether that of
    decode steps can be."""
    if engine.cuda_graphs == "off":
        return "engine.cuda_graphs=off"
    if device.type != "cuda":
        return f"there are no CUDA graphs on {device.type}"
    if not attention:
        return "the attention backend of decode steps can't be captured (attention.decode)"
    if dispatcher is not None and not dispatcher.capturable:
        return "what carries rows to experts can't be captured (moe_a2a.decode)"
    waiting = [name for name, comm in comms.axes.items() if not comm.capturable]
    if waiting:
        return f"communication can't be captured (comm; axes {', '.join(waiting)})"
    return None


@dataclass(frozen=True, slots=True)
class _Captured:
    """A size that can be replayed: to this rank's part of the logits and best ids (S,)."""

    rows: DecodeRows
    replay: Replay


class GraphedSteps:
    """Replays the decode steps that `capture` recorded, and has `rest` compute all others."""

    def __init__(
        self,
        parts: RankParts,
        rest: Steps,
        *,
        sizes: Sequence[int],
        max_model_len: int,
        staging: Staging,
        recorder: Recorder,
    ) -> None:
        self._parts = parts
        self._rest = rest
        self._staging, self._recorder = staging, recorder
        self._max_model_len = max_model_len
        self.sizes = tuple(sizes)
        self.graph_bytes = 0
        state, most = parts.state, self.sizes[-1]
        device = state.device
        self._input = StepInput(packed_length(most), device)
        self._ids_S, self._positions_S, self._kv_slots_S = torch.zeros(
            (3, most), dtype=torch.int64, device=device
        )
        self._contexts_S = torch.zeros(most, dtype=torch.int32, device=device)
        self._table_SM = torch.zeros(
            (most, state.pages_SM.shape[1]), dtype=torch.int32, device=device
        )
        self._starts_S1 = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._captured: dict[int, _Captured] = {}

    @torch.inference_mode()
    def capture(self, on_captured: OnCaptured) -> None:
        """Record every size, the largest first, so that the others fit into its memory. Leaves
        tokens, pages and caches as they are: no row of what runs meanwhile is real."""
        before = self._recorder.held_bytes()
        total = self.num_captures
        self._rest.capture(lambda done, _: on_captured(done, total))
        self._input.clear()
        for done, size in enumerate(reversed(self.sizes), start=self._rest.num_captures + 1):
            rows = self._rows(size)
            replay = self._recorder.record(partial(self._run, rows))
            self._captured[size] = _Captured(rows, replay)
            on_captured(done, total)
        self.graph_bytes = self._recorder.held_bytes() - before

    @property
    def num_captures(self) -> int:
        return self._rest.num_captures + len(self.sizes)

    @property
    def most_prompt_rows(self) -> int:
        return self._rest.most_prompt_rows

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Every size, the largest first. Leaves what `capture` leaves."""
        self._rest.rehearse()
        self._input.clear()
        for size in reversed(self.sizes):
            self._run(self._rows(size))

    def describe(self) -> str:
        """For the start-up summary."""
        decodes = f"{len(self.sizes)} decode steps of up to {self.sizes[-1]} requests"
        return f"{decodes}; others: {self._rest.describe()}"

    def compute(self, scheduled: ScheduledStep, facts: StepFacts) -> ComputedStep:
        """Any step; replayed where its size was captured, and every row decodes."""
        captured = self._captured_for(facts)
        if captured is None:
            return self._rest.compute(scheduled, facts)
        rows, state = captured.rows, self._parts.state
        state.enter(scheduled)
        if len(scheduled.table_slots) > rows.input_ids_S.shape[0]:
            state.update(scheduled)
        slots, positions = send_decodes(self._input, scheduled, rows)
        logits_AL, best_S = captured.replay()
        step_rows = self._parts.rows([best_S.shape[0]] * self._parts.plan.dp)
        whole: LogitsOf = partial(self._parts.model.head.whole, logits_AL, step_rows)
        if self._parts.shares_head and not facts.best_only:
            whole = known(whole())
        count = len(slots)

        def store(ids_R: Tensor) -> None:
            self._staging.store(ids_R, rows.places, state.tokens_SL)

        return ComputedStep(
            None,
            lambda: whole()[:count],
            lambda: logits_AL[:count],
            best_S[:count],
            slots,
            positions + 1,
            store,
        )

    def logits(self, hidden_RE: Tensor, by_dp: Sequence[int]) -> Tensor:
        """Eagerly."""
        return self._rest.logits(hidden_RE, by_dp)

    def _captured_for(self, facts: StepFacts) -> _Captured | None:
        most = max(facts.rows)
        if facts.has_prefill or facts.samples != facts.rows or most > self.sizes[-1]:
            return None
        return self._captured.get(self.sizes[bisect_left(self.sizes, most)])

    def _rows(self, size: int) -> DecodeRows:
        return DecodeRows(
            self._input.packed[: packed_length(size)],
            self._ids_S[:size],
            self._positions_S[:size],
            self._kv_slots_S[:size],
            self._contexts_S[:size],
            self._table_SM[:size],
        )

    def _run(self, rows: DecodeRows) -> tuple[Tensor, Tensor]:
        """What a graph holds. Returns this rank's part of the logits, and each row's best token:
        parts are exchanged, so that it is the same on all ranks."""
        parts, size = self._parts, rows.input_ids_S.shape[0]
        state = parts.state
        self._staging.stage(rows, state.tokens_SL, state.pages_SM, state.page_size)
        sequences = SequenceBatch(
            query_lens=[1] * size,
            context_lens=[self._max_model_len] * size,
            query_starts_S1=self._starts_S1[: size + 1],
            context_lens_S=rows.context_lens_S,
            page_table_SM=rows.page_table_SM,
        )
        batch = Batch(
            input_ids_T=rows.input_ids_S,
            positions_T=rows.positions_S,
            kv_slots_T=rows.kv_slots_S,
            num_real=rows.num_real,
            num_decodes=size,
            decode=sequences,
            prefill=None,
        )
        step_rows = parts.rows([size] * parts.plan.dp)
        hidden_SE = parts.forward(batch, step_rows, "decode")
        head = parts.model.head
        logits_AL = head.partial(hidden_SE, step_rows)
        best_S = head.best(logits_AL, step_rows, self._staging)
        self._staging.store(best_S, rows.places, state.tokens_SL)
        return logits_AL, best_S


def make_steps(
    engine: EngineConfig,
    parts: RankParts,
    *,
    max_model_len: int,
    comms: Comms,
    dispatchers: Mapping[str, Dispatcher],
) -> Steps:
    """What computes the steps of a rank. Every rank decides alike. `dispatchers` by phase, empty
    where the model has no experts."""
    device = parts.state.device
    reason = reason_for_eager(
        engine,
        device,
        attention=parts.attention.capturable,
        dispatcher=dispatchers.get("decode"),
        comms=comms,
    )
    if reason is not None:
        return EagerSteps(parts, reason)
    from core.devices.select import select_staging
    from core.engine.step.recorder import select_recorder

    multiple = parts.plan.tp_attn if parts.stream is Layout.ROWS else 1
    common: dict[str, Any] = {
        "max_model_len": max_model_len,
        "staging": select_staging(device),
        "recorder": select_recorder(device),
    }
    rest: Steps = EagerSteps(parts, "none is captured")
    most_rows = engine.max_prefill_tokens + engine.running_limit
    sizes = prompt_sizes(min(engine.max_graph_tokens, most_rows), multiple)
    captures_prompts = parts.attention.prompts_capturable
    for dispatcher in dispatchers.values():
        captures_prompts &= dispatcher.capturable
    if captures_prompts and sizes:
        num_sequences = min(MOST_SEQUENCES, engine.running_limit)
        rest = PromptGraphs(parts, rest, sizes=sizes, num_sequences=num_sequences, **common)
    sizes = graph_sizes(most_graph_rows(engine), multiple)
    return GraphedSteps(parts, rest, sizes=sizes, **common)
