"""How a gate's logits become experts and weights: settings of a model, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a gate's logits become experts and weights.

    Scores are softmax or sigmoid of the logits. With groups, only the `num_chosen_groups` best
    groups compete: a group's worth is the sum of its best `group_top` scores (1: the best score).
    A bias, where there is one, is added for choosing only. Weights are the scores of the chosen,
    divided by their sum if `normalise`, times `scale`. Source: transformers' modeling_deepseek_v2
    and _v3, modeling_qwen3_moe, modeling_mixtral.
    """

    top_k: int
    scoring: str  # "softmax" or "sigmoid"
    normalise: bool
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_top: int = 1
