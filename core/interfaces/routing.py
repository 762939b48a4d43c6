"""How a gate's logits become experts and weights, and where these experts stand.

Shape legend: X logical experts, C most copies of one expert.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a gate's logits become experts and weights.

    Scores are softmax or sigmoid of the logits. With groups, only the `num_chosen_groups` best
    groups compete: a group's worth is the sum of its best `group_top` scores (1: the best score).
    A bias, where there is one, is added for choosing only. Weights are the scores of the chosen,
    divided by their sum if `normalise`, times `scale`. Source: transformers' modeling_deepseek_v2
    and _v3, modeling_qwen3_moe, modeling_mixtral.

    "uniform_random" is for benchmarks: scores are a hash of the logit's bits, the row and the
    expert, so that made-up weights load experts evenly; biases and groups have no say.
    """

    top_k: int
    scoring: str  # "softmax", "sigmoid" or "uniform_random"
    normalise: bool
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_top: int = 1

    def uniform(self) -> "Routing":
        """The same number of experts, drawn at random."""
        return replace(
            self,
            scoring="uniform_random",
            normalise=True,
            num_groups=1,
            num_chosen_groups=1,
            group_top=1,
        )


class Copies(NamedTuple):
    """Where the copies of every expert stand, on the device; written in place when they move."""

    physical_XC: Tensor  # int64; -1 past an expert's copies
    num_copies_X: Tensor  # int64


class Destinations(NamedTuple):
    """Logical experts -> the physical ones of one step's rows.

    Row t is padding, which has no expert, where first_row + t >= num_real. Of an expert's copies
    row t takes number first_copy + t, in turn.
    """

    copies: Copies
    counts_X: Tensor  # int64: real rows of each logical expert are added
    num_real: Tensor  # int32 (1,), on the device
    first_row: int
    first_copy: int
