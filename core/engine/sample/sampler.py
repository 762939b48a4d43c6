"""Chooses the next token of each sampling row. Knows nothing of models, requests or scheduling.

`Sampler` keeps the sampling parameters of every slot on the host, in numpy arrays. `prepare`
decides once a step which stages the batch needs and sends their small tensors to the device in one
copy; `sample` then only queues device work. A batch of greedy rows costs one argmax.

Order: logit_bias, min_tokens, repetition, frequency and presence penalties, logits processors
(those that mask last); greedy rows take the best token of that; else temperature, top_k, top_p,
min_p, draw. Logprobs are none of this module's business: they come from the logits as the model
gave them, which `sample` leaves untouched.

What is done to whole rows goes through a `Vocabulary` (core.engine.sample.vocabulary): all columns
of the logits, or those that this rank has, where ranks choose tokens together.

Shape legend: R rows that sample, V vocabulary, X columns of it that are here, S slots, L tokens of
a slot, N entries of all rows' edits, P rows with penalties, D rows that draw (not greedy), F rows
of D with a filter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.engine.sample import operations as sampling
from core.engine.sample.operations import Filter
from core.engine.sample.processors import Applied, ProcessorChain, edit_all_, no_processors
from core.engine.sample.vocabulary import Vocabulary, WholeVocabulary
from core.engine.step.batch import Ints, send
from core.interfaces.messages import LEAST_TEMPERATURE, SamplingParams, SlotInit

# Rows with at most this top_k find their threshold in a top-k list instead of a sorted row.
LONGEST_TOP_K = {"cpu": 128, "cuda": 1024}

# What a slot needs beyond an argmax.
DRAWS, BIASED, PENALISED, HAS_MIN_TOKENS, PROCESSED, WHOLE_ROWS = 1, 2, 4, 8, 16, 32

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Edits:
    """Entries of the logits to change: `indices_N` into a flattened `Vocabulary.copy`."""

    indices_N: Tensor
    values_N: Tensor  # float32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with repetition, presence or frequency penalties; None where no row has one."""

    rows_P: Tensor
    slots_P: Tensor
    num_tokens_P: Tensor
    num_prompt_P: Tensor
    most_tokens: int
    repetition_P: Tensor | None
    presence_P: Tensor | None
    frequency_P: Tensor | None


@dataclass(frozen=True, slots=True)
class Draw:
    """The rows that are not greedy."""

    rows_D: Tensor | None  # None: all
    temperature_D: Tensor
    uniform_D: Tensor
    min_p_D: Tensor | None  # the least threshold; None where no row has any filter
    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What `Sampler.sample` does in one step; tensors are on the device."""

    num_rows: int
    over: Vocabulary  # the columns of the logits
    bias: Edits | None = None
    forbidden: Edits | None = None
    penalties: Penalties | None = None
    processors: tuple[Applied, ...] = ()
    draw: Draw | None = None


class Sampler:
    """Samples for one rank. Results depend on a request's own logits, tokens and seed alone."""

    def __init__(
        self,
        *,
        max_slots: int,
        vocab_size: int,
        device: torch.device,
        eos_ids: Sequence[int],
        processors: ProcessorChain | None = None,
    ) -> None:
        """`processors`: what requests may name; None: none."""
        self.vocab_size = vocab_size
        self.whole = WholeVocabulary(vocab_size)
        self.device = device
        self.eos_ids = tuple(eos_ids)
        self._processors = processors or no_processors(device)
        self._needs = np.zeros(max_slots, dtype=np.int64)
        self._num_prompt = np.zeros(max_slots, dtype=np.int64)
        self._min_tokens = np.zeros(max_slots, dtype=np.int64)
        self._top_k = np.zeros(max_slots, dtype=np.int64)  # vocab_size: none
        self._seed = np.zeros(max_slots, dtype=np.uint64)
        self._temperature = np.zeros(max_slots, dtype=np.float32)
        self._top_p = np.ones(max_slots)  # float64, as it is compared with a sum
        self._min_p = np.zeros(max_slots, dtype=np.float32)
        self._repetition = np.ones(max_slots, dtype=np.float32)
        self._presence = np.zeros(max_slots, dtype=np.float32)
        self._frequency = np.zeros(max_slots, dtype=np.float32)
        self._bias: dict[int, tuple[Ints, Floats]] = {}  # by slot: ids and values
        self._forbidden: dict[int, Ints] = {}  # by slot: ids not to choose before min_tokens

    def init_slots(self, inits: Sequence[SlotInit]) -> None:
        """Take over the parameters of requests that enter slots; before the step's `prepare`."""
        for init in inits:
            self._init_slot(init)

    def _init_slot(self, init: SlotInit) -> None:
        slot, params = init.slot, init.sampling
        self._num_prompt[slot] = init.num_prompt
        self._min_tokens[slot] = params.min_tokens
        no_limit = params.top_k <= 0 or params.top_k > self.vocab_size
        self._top_k[slot] = self.vocab_size if no_limit else params.top_k
        self._seed[slot] = init.seed % 2**64
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition[slot] = params.repetition_penalty
        self._presence[slot] = params.presence_penalty
        self._frequency[slot] = params.frequency_penalty
        bias = {i: v for i, v in params.logit_bias.items() if self._in_vocabulary(i)}
        forbidden = {i for i in (*self.eos_ids, *params.stop_token_ids) if self._in_vocabulary(i)}
        self._bias[slot] = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        self._forbidden[slot] = np.array(sorted(forbidden), np.int64)
        is_processed, needs_whole_rows = self._processors.init_slot(init)
        self._needs[slot] = (
            DRAWS * (params.temperature >= LEAST_TEMPERATURE)
            + BIASED * bool(bias)
            + PENALISED * _has_penalty(params)
            + HAS_MIN_TOKENS * (params.min_tokens > 0 and bool(forbidden))
            + PROCESSED * is_processed
            + WHOLE_ROWS * needs_whole_rows
        )

    def _in_vocabulary(self, token_id: int) -> bool:
        """Ids outside can't be chosen anyway; on a GPU, indexing with one ends the process."""
        return 0 <= token_id < self.vocab_size

    def is_greedy(self, slots: Ints) -> bool:
        """Whether these slots never need more than the best of the logits as they are."""
        return not self._needs[slots].any()

    def needs_whole_rows(self, slots: Ints) -> bool:
        """Whether a logits processor of these slots needs all columns of the logits."""
        return bool((self._needs[slots] & WHOLE_ROWS).any())

    def draws(self, slots: Ints) -> bool:
        """Whether any of these slots draws a token at random."""
        return bool((self._needs[slots] & DRAWS).any())

    def prepare(
        self,
        slots: Sequence[int] | Ints,
        next_positions: Sequence[int] | Ints,
        over: Vocabulary | None = None,
    ) -> SamplingBatch:
        """Decide what one step needs and start copying it to the device. Never waits for it.

        Row i of the logits belongs to `slots[i]`, whose token at `next_positions[i]` (counted
        from the start of the prompt) is chosen: as many tokens are known before it. `over` says
        which columns the logits have; None: all.
        """
        over = over or self.whole
        slots_R = np.asarray(slots, dtype=np.int64)
        needs_R = self._needs[slots_R]
        needs = int(np.bitwise_or.reduce(needs_R, initial=0))
        if not needs:
            return SamplingBatch(len(slots), over)
        positions_R = np.asarray(next_positions, dtype=np.int64)
        generated_R = positions_R - self._num_prompt[slots_R]
        early_R = (needs_R & HAS_MIN_TOKENS > 0) & (generated_R < self._min_tokens[slots_R])
        return SamplingBatch(
            num_rows=len(slots),
            over=over,
            bias=self._bias_edits(slots_R, (needs_R & BIASED).nonzero()[0], over),
            forbidden=self._forbidden_edits(slots_R, early_R.nonzero()[0], over),
            penalties=self._penalties(slots_R, positions_R, (needs_R & PENALISED).nonzero()[0]),
            processors=self._processors.prepare(slots_R, positions_R) if needs & PROCESSED else (),
            draw=self._draw(slots_R, positions_R, (needs_R & DRAWS).nonzero()[0]),
        )

    def sample(self, batch: SamplingBatch, logits_RX: Tensor, tokens_SL: Tensor) -> Tensor:
        """The chosen ids, int64 (R,) on the device; returns without waiting for a GPU.

        `logits_RX` is float32 and left as it is: the columns of `batch.over`. All ranks that share
        the vocabulary call this and get the same. `tokens_SL` (int32 or int64) holds every slot's
        known tokens by the time the device gets here. Scratch: a copy of the logits for edits, one
        or two for rows that draw, and the kernels' chunk. A row with NaN gives some valid id;
        other rows don't notice.
        """
        if batch.num_rows == 0:
            return torch.empty(0, dtype=torch.int64, device=logits_RX.device)
        over = batch.over
        logits_RX = over.tokens_of(_edited(batch, logits_RX, tokens_SL))
        top_R, best_R = over.best(logits_RX)
        draw = batch.draw
        if draw is None:
            return best_R
        if draw.rows_D is None:
            return _drawn(draw, over, logits_RX, top_R, best_R)
        rows_D = draw.rows_D
        drawn_D = _drawn(draw, over, logits_RX[rows_D], top_R[rows_D], best_R[rows_D])
        return best_R.index_copy_(0, rows_D, drawn_D)

    def _bias_edits(self, slots_R: Ints, rows: Ints, over: Vocabulary) -> Edits | None:
        if not len(rows):
            return None
        each = [(row, *self._bias[slots_R[row]]) for row in rows]
        indices_N = np.concatenate(
            [row * over.num_columns + over.columns(ids) for row, ids, _ in each]
        )
        values_N = np.concatenate([values for _, _, values in each])
        return Edits(*send(self.device, indices_N, values_N))

    def _forbidden_edits(self, slots_R: Ints, rows: Ints, over: Vocabulary) -> Edits | None:
        if not len(rows):
            return None
        each = [(row, self._forbidden[slots_R[row]]) for row in rows]
        indices_N = np.concatenate(
            [row * over.num_columns + over.columns(ids) for row, ids in each]
        )
        values_N = np.full(len(indices_N), -np.inf, dtype=np.float32)
        return Edits(*send(self.device, indices_N, values_N))

    def _penalties(self, slots_R: Ints, positions_R: Ints, rows: Ints) -> Penalties | None:
        if not len(rows):
            return None
        slots_P, positions_P = slots_R[rows], positions_R[rows]
        host = (self._repetition[slots_P], self._presence[slots_P], self._frequency[slots_P])
        row_ids, slot_ids, num_tokens, num_prompt, *device = send(
            self.device, rows, slots_P, positions_P, self._num_prompt[slots_P], *host
        )
        repetition, presence, frequency = (
            on_device if (on_host != neutral).any() else None
            for on_host, on_device, neutral in zip(host, device, (1.0, 0.0, 0.0), strict=True)
        )
        return Penalties(
            rows_P=row_ids,
            slots_P=slot_ids,
            num_tokens_P=num_tokens,
            num_prompt_P=num_prompt,
            most_tokens=int(positions_P.max()),
            repetition_P=repetition,
            presence_P=presence,
            frequency_P=frequency,
        )

    def _draw(self, slots_R: Ints, positions_R: Ints, rows: Ints) -> Draw | None:
        if not len(rows):
            return None
        slots_D = slots_R[rows]
        uniform_D = sampling.uniform_numbers(self._seed[slots_D], positions_R[rows])
        top_k_D, top_p_D, min_p_D = self._top_k[slots_D], self._top_p[slots_D], self._min_p[slots_D]
        some_k_D = top_k_D < self.vocab_size
        short_D = some_k_D & (top_k_D <= LONGEST_TOP_K[self.device.type])
        long_D = ~short_D & (some_k_D | (top_p_D < 1))
        groups = [
            members for members in (short_D.nonzero()[0], long_D.nonzero()[0]) if len(members)
        ]
        columns = [(part, top_k_D[part], top_p_D[part], min_p_D[part]) for part in groups]
        row_ids, temperature, uniform, min_p, *rest = send(
            self.device,
            rows,
            self._temperature[slots_D],
            uniform_D,
            min_p_D,
            *(array for group in columns for array in group),
        )
        filters = []
        for group, (part, top_k_F, top_p_F, _) in enumerate(columns):
            part_ids, top_k, top_p, part_min_p = rest[4 * group : 4 * group + 4]
            most = int(top_k_F.max())
            filters.append(
                Filter(
                    rows_F=None if len(part) == len(rows) else part_ids,
                    num_sorted=most if short_D[part[0]] else self.vocab_size,
                    top_k_F=top_k if (top_k_F < self.vocab_size).any() else None,
                    top_p_F=top_p if (top_p_F < 1).any() else None,
                    min_p_F=part_min_p,
                )
            )
        return Draw(
            rows_D=None if len(rows) == len(slots_R) else row_ids,
            temperature_D=temperature,
            uniform_D=uniform,
            min_p_D=min_p if filters or (min_p_D > 0).any() else None,
            filters=tuple(filters),
        )


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _edited(batch: SamplingBatch, logits_RX: Tensor, tokens_SL: Tensor) -> Tensor:
    """The logits as they are chosen from, before temperature; a copy if there are any."""
    if (
        batch.bias is None
        and batch.forbidden is None
        and batch.penalties is None
        and not batch.processors
    ):
        return logits_RX
    logits_RX = batch.over.copy(logits_RX)
    flat = logits_RX.view(-1)
    if batch.bias is not None:
        flat.scatter_add_(0, batch.bias.indices_N, batch.bias.values_N)
    if batch.forbidden is not None:
        flat.scatter_(0, batch.forbidden.indices_N, batch.forbidden.values_N)
    some = batch.penalties
    if some is not None:
        tokens_PL = tokens_SL[:, : some.most_tokens].index_select(0, some.slots_P).long()
        sampling.apply_penalties_(
            logits_RX,
            some.rows_P,
            batch.over.columns_of(tokens_PL),
            num_tokens_P=some.num_tokens_P,
            num_prompt_P=some.num_prompt_P,
            repetition_P=some.repetition_P,
            presence_P=some.presence_P,
            frequency_P=some.frequency_P,
        )
    edit_all_(batch.processors, logits_RX, batch.over, tokens_SL)
    return logits_RX


def _drawn(
    draw: Draw, over: Vocabulary, logits_DX: Tensor, top_D: Tensor, best_D: Tensor
) -> Tensor:
    ratio_DX = sampling.relative_probabilities(logits_DX, top_D, draw.temperature_D)
    threshold_D = draw.min_p_D
    for some in draw.filters:
        threshold_F = over.filter_thresholds(ratio_DX, some)
        if some.rows_F is None:
            threshold_D = threshold_F
        else:
            assert threshold_D is not None
            threshold_D = threshold_D.index_copy(0, some.rows_F, threshold_F)
    return over.draw_tokens(ratio_DX, threshold_D, draw.uniform_D, best_D)
