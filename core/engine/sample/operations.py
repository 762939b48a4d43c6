"""Choosing tokens from logits: pure tensor functions, the oracle last. Knows nothing of requests,
slots or steps (`core.engine.sample.sampler` does); none of it makes the host wait for a GPU.

A row's probabilities are held as fixed-point integers, 2^35 for the most likely token, so that
sums are exact in any order: the token drawn for a given uniform number depends on the row alone,
not on the batch, the path (sort, top-k list, none) or the blocking of a sum. (Float sums differ in
their last bits with a batch's shape, and atomics on a GPU even from run to run.)

Every filter is a threshold on exp((logit - max) / temperature), so tokens of equal logits stay or
go together. transformers does that for top_k and min_p; for top_p it keeps an arbitrary part of
the tokens that tie at the edge.

Shape legend: R rows, V vocabulary, F rows with a filter, K candidates kept sorted, P rows with
penalties, L tokens of the longest of them, B blocks of a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

# A row's total stays below 2^53 up to V = 2^18: exact in float64 as well. What is lost is
# probabilities below 3e-11 of the most likely token's.
WEIGHT_SCALE = 2.0**35
BLOCK = 128  # divides the vocabulary of every family we know; others are padded
# Logits worked on at a time, which bounds scratch memory: about 30 MB on a CPU, where fresh pages
# cost more than the arithmetic (yet every operation ends in a barrier of the threads, so a batch
# of 16 should be one chunk), and 500 MB on a GPU.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}


def row_chunks(num_rows: int, like_RV: Tensor, num_columns: int | None = None) -> list[slice]:
    """Row slices of at most CHUNK_LOGITS each, or of one row; none if there are no rows.
    `num_columns`: as if rows had so many."""
    num_columns = num_columns or like_RV.shape[1]
    chunk_rows = max(1, CHUNK_LOGITS[like_RV.device.type] // num_columns)
    return [slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows)]


def uniform_numbers(
    seeds_R: npt.NDArray[np.uint64], positions_R: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), on the host.

    A counter-based generator: the seed is mixed, the position steps along SplitMix64's sequence
    from there, and the result is mixed again (Steele, Lea and Flood 2014, the finaliser "Mix13").
    The host knows both arguments, and a dozen operations on a few numbers cost less here than
    their launches on a GPU; being integers, they would give the same there.
    """
    state_R = _mix64(seeds_R + _GOLDEN) + positions_R.astype(np.uint64) * _GOLDEN
    return (_mix64(state_R) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def apply_penalties_(
    logits_RV: Tensor,
    rows_P: Tensor,
    tokens_PL: Tensor,
    *,
    num_tokens_P: Tensor,
    num_prompt_P: Tensor,
    repetition_P: Tensor | None,
    presence_P: Tensor | None,
    frequency_P: Tensor | None,
) -> None:
    """Apply the penalties of the tokens seen so far to some rows, in place.

    `tokens_PL` (int64) holds prompt and generated ids; what lies beyond `num_tokens_P` (at least
    1) is ignored. Repetition (prompt and generated) divides positive logits and multiplies
    negative ones; presence (once) and frequency (per occurrence) are subtracted for generated
    tokens. Each is float32 (P,), or None where no row has it. As in vLLM and transformers.
    """
    for part in row_chunks(rows_P.shape[0], logits_RV):
        _penalise_rows_(
            logits_RV,
            rows_P[part],
            tokens_PL[part],
            num_tokens_P[part],
            num_prompt_P[part],
            None if repetition_P is None else repetition_P[part],
            None if presence_P is None else presence_P[part],
            None if frequency_P is None else frequency_P[part],
        )


def _penalise_rows_(
    logits_RV: Tensor,
    rows_P: Tensor,
    tokens_PL: Tensor,
    num_tokens_P: Tensor,
    num_prompt_P: Tensor,
    repetition_P: Tensor | None,
    presence_P: Tensor | None,
    frequency_P: Tensor | None,
) -> None:
    num_rows, vocab_size = rows_P.shape[0], logits_RV.shape[1]
    column_L = torch.arange(tokens_PL.shape[1], device=tokens_PL.device)
    known_PL = column_L < num_tokens_P[:, None]
    # Only seen tokens are touched. A token seen twice is written twice, with the same value; what
    # is not known stands for the row's first token.
    ids_PL = torch.where(known_PL, tokens_PL, tokens_PL[:, :1])
    index_PL = ids_PL + rows_P[:, None] * vocab_size
    flat_RV = logits_RV.view(-1)
    value_PL = flat_RV[index_PL]
    if repetition_P is not None:
        factor_P1 = repetition_P[:, None]
        value_PL = torch.where(value_PL > 0, value_PL / factor_P1, value_PL * factor_P1)
    if presence_P is not None or frequency_P is not None:
        generated_PL = known_PL & (column_L >= num_prompt_P[:, None])
        counts_PV = torch.zeros((num_rows, vocab_size), device=logits_RV.device)
        counts_PV.scatter_add_(1, ids_PL, generated_PL.to(counts_PV.dtype))
        count_PL = counts_PV.gather(1, ids_PL)
        if frequency_P is not None:
            value_PL = value_PL - count_PL * frequency_P[:, None]
        if presence_P is not None:
            value_PL = value_PL - (count_PL > 0) * presence_P[:, None]
    flat_RV[index_PL] = value_PL


def relative_probabilities(logits_RV: Tensor, top_R: Tensor, temperature_R: Tensor) -> Tensor:
    """exp((logit - top) / temperature): each token's probability over the most likely one's.

    `top_R` is the row's largest logit. A row holding NaN, or infinity as its largest, gives NaN
    there; the functions below give such tokens no weight.
    """
    return (logits_RV - top_R[:, None]).div_(temperature_R[:, None]).exp_()


@dataclass(frozen=True, slots=True)
class Filter:
    """Rows of the drawing rows that share one way to find what top_k, top_p and min_p leave."""

    rows_F: Tensor | None  # None: all
    num_sorted: int  # V, or less where every row has a top_k: only so many candidates are sorted
    top_k_F: Tensor | None  # int64 in 1..num_sorted; None: no row has one
    top_p_F: Tensor | None  # float64; None: no row has one
    min_p_F: Tensor  # float32; 0: none

    @property
    def num_rows(self) -> int:
        return self.min_p_F.shape[0]

    def part(self, part: slice, ratio_DX: Tensor) -> "tuple[Filter, Tensor]":
        """Some of its rows, and their ratios (F, X), of those of all drawing rows."""
        rows_F = None if self.rows_F is None else self.rows_F[part]
        some = Filter(
            rows_F,
            self.num_sorted,
            None if self.top_k_F is None else self.top_k_F[part],
            None if self.top_p_F is None else self.top_p_F[part],
            self.min_p_F[part],
        )
        return some, ratio_DX[part] if rows_F is None else ratio_DX[rows_F]


def filter_thresholds(ratio_RV: Tensor, filtered: Filter) -> Tensor:
    """The least `ratio_RV` (see relative_probabilities) that stays in each row of the filter, (F,).

    Order: top_k, top_p over what that leaves, min_p, as in transformers and SGLang. (vLLM takes
    min_p first; that differs only for rows with both top_p and min_p.)
    """
    parts = row_chunks(filtered.num_rows, ratio_RV)
    return joined([_thresholds(*filtered.part(part, ratio_RV)) for part in parts])


def _thresholds(some: Filter, ratio_FV: Tensor) -> Tensor:
    top_k_F, top_p_F, min_p_F = some.top_k_F, some.top_p_F, some.min_p_F
    if some.num_sorted == ratio_FV.shape[1]:
        head_FK = sorted_rows(ratio_FV)
        kth_F = head_FK[:, 0] if top_k_F is None else kth_of_head(head_FK, top_k_F)
        return threshold_in_head(head_FK, kth_F, None, top_p_F, min_p_F)
    assert top_k_F is not None
    head_FK = ratio_FV.topk(some.num_sorted, dim=-1).values.flip(-1)
    kth_F = kth_of_head(head_FK, top_k_F)
    total_F = None if top_p_F is None else fixed_point(ratio_FV, kth_F).sum(-1)
    return threshold_in_head(head_FK, kth_F, total_F, top_p_F, min_p_F)


def kth_of_head(head_FK: Tensor, top_k_F: Tensor) -> Tensor:
    """The top_k-th largest ratio of each row, (F,); `head_FK` holds the K largest, rising."""
    return head_FK.gather(1, head_FK.shape[1] - top_k_F[:, None])[:, 0]


def threshold_in_head(
    head_FK: Tensor,
    kth_F: Tensor,
    total_F: Tensor | None,
    top_p_F: Tensor | None,
    min_p_F: Tensor,
) -> Tensor:
    """`filter_thresholds` of rows whose K largest ratios `head_FK` are known, rising, and what
    top_k leaves. `total_F`: the weight of all ratios from `kth_F` on, also of those that tie with
    the k-th outside of the head; None: there are none outside, or no row has a top_p."""
    if top_p_F is None:
        return torch.maximum(kth_F, min_p_F)
    up_to_FK = fixed_point(head_FK, kth_F).cumsum(-1)
    head_total_F = up_to_FK[:, -1]
    wanted_F = wanted_weight(head_total_F if total_F is None else total_F, top_p_F)
    first_F1 = torch.searchsorted(up_to_FK, (head_total_F - wanted_F)[:, None], right=True)
    last_F = head_FK.gather(1, first_F1.clamp_(max=head_FK.shape[1] - 1))[:, 0]
    return torch.maximum(torch.maximum(kth_F, last_F), min_p_F)


def wanted_weight(total_F: Tensor, top_p_F: Tensor) -> Tensor:
    """The weight that top_p leaves at least: a token stays if the more likely ones together have
    less, the best one always."""
    return (total_F * top_p_F).ceil().to(torch.int64)


def draw_tokens(
    ratio_RV: Tensor, threshold_R: Tensor | None, uniform_R: Tensor, fallback_R: Tensor
) -> Tensor:
    """Draw one token (int64) for each row by inverse CDF, in vocabulary order.

    `ratio_RV` is relative_probabilities'; tokens below `threshold_R` have no weight. A token
    without weight is never drawn; a row without any (NaN, all minus infinity) gives `fallback_R`.
    `uniform_R` is float64 in [0, 1).
    """
    return joined(
        [
            _draw(
                fixed_point(ratio_RV[part], None if threshold_R is None else threshold_R[part]),
                uniform_R[part],
                fallback_R[part],
            )
            for part in row_chunks(ratio_RV.shape[0], ratio_RV)
        ]
    )


def _draw(weight_RV: Tensor, uniform_R: Tensor, fallback_R: Tensor) -> Tensor:
    sums = BlockSums.of(weight_RV)
    total_R1 = sums.total_R1
    token_R1 = sums.token_at(drawn_weight(uniform_R, total_R1))
    return torch.where(total_R1 > 0, token_R1, fallback_R[:, None])[:, 0]


def drawn_weight(uniform_R: Tensor, total_R1: Tensor) -> Tensor:
    """Which of a row's weight units is drawn, from 0 on (R, 1)."""
    target_R1 = (uniform_R[:, None] * total_R1).to(torch.int64)  # rounds down
    return torch.minimum(target_R1, total_R1 - 1)


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Weights in blocks of BLOCK, and their sums. Two levels, blocks first: a cumsum over whole
    rows would be read and written once more."""

    weight_RBC: Tensor
    block_RB: Tensor
    up_to_RB: Tensor

    @classmethod
    def of(cls, weight_RV: Tensor) -> "BlockSums":
        """Of weights as `fixed_point` gives them."""
        vocab_size = weight_RV.shape[1]
        if vocab_size % BLOCK:
            weight_RV = functional.pad(weight_RV, (0, BLOCK - vocab_size % BLOCK))
        weight_RBC = weight_RV.view(weight_RV.shape[0], -1, BLOCK)
        block_RB = weight_RBC.sum(-1)
        return cls(weight_RBC, block_RB, block_RB.cumsum(-1))

    @property
    def total_R1(self) -> Tensor:
        """int64"""
        return self.up_to_RB[:, -1:]

    def token_at(self, target_R1: Tensor) -> Tensor:
        """The token that has the unit `target_R1` of its row's weight (R, 1); some column where
        the row has no such unit."""
        up_to_RB = self.up_to_RB
        chosen_R1 = torch.searchsorted(up_to_RB, target_R1, right=True)
        chosen_R1.clamp_(max=up_to_RB.shape[1] - 1)  # only where there is no such unit
        inside_R1 = target_R1 - up_to_RB.gather(1, chosen_R1) + self.block_RB.gather(1, chosen_R1)
        index_R1C = chosen_R1[:, :, None].expand(-1, 1, BLOCK)
        up_to_RC = self.weight_RBC.gather(1, index_R1C)[:, 0].cumsum(-1)
        return chosen_R1 * BLOCK + torch.searchsorted(up_to_RC, inside_R1, right=True)


def sample_oracle(
    logits_RV: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform_R: Tensor,
) -> Tensor:
    """The slow and plain meaning of the functions above: float64, one row at a time, on the CPU.

    top_k 0, top_p 1 and min_p 0 mean none. Rows must be free of NaN.
    """
    tokens = []
    for logits_V, uniform in zip(logits_RV.double().cpu(), uniform_R.tolist(), strict=True):
        probs_V = torch.softmax(logits_V / temperature, -1)
        if top_k > 0:
            probs_V = torch.where(
                probs_V < probs_V.sort(descending=True).values[top_k - 1], 0.0, probs_V
            )
        probs_V /= probs_V.sum()
        sorted_V = probs_V.sort(descending=True).values
        before_V = torch.cat([sorted_V.new_zeros(1), sorted_V.cumsum(-1)[:-1]])
        num_kept = max(1, int((before_V < top_p).sum()))
        probs_V = torch.where(probs_V < sorted_V[num_kept - 1], 0.0, probs_V)
        probs_V = torch.where(probs_V < min_p * probs_V.max(), 0.0, probs_V)
        up_to_V = (probs_V / probs_V.sum()).cumsum(-1)
        allowed = probs_V.nonzero()[:, 0]
        place = int(torch.searchsorted(up_to_V[allowed], uniform, right=True))
        tokens.append(int(allowed[min(place, len(allowed) - 1)]))
    return torch.tensor(tokens)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def joined(parts: list[Tensor]) -> Tensor:
    """Chunks of rows, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fixed_point(ratio_RV: Tensor, threshold_R: Tensor | None) -> Tensor:
    """Weights as int64, zero below the threshold and for NaN (which compares false)."""
    kept_RV = ratio_RV >= (0.0 if threshold_R is None else threshold_R[:, None])
    return torch.where(kept_RV, ratio_RV, 0.0).mul_(WEIGHT_SCALE).to(torch.int64)


def sorted_rows(x_FV: Tensor) -> Tensor:
    """Each row ascending. numpy's sort is vectorised: ten times as fast as torch's on a CPU."""
    if x_FV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_FV.numpy(), axis=-1))
    return x_FV.sort(dim=-1).values
