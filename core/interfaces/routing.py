"""How a gate's logits become experts and weights: settings of a model, no torch."""

from dataclasses import dataclass, replace


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
