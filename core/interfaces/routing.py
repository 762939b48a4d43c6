"""How the logits of a router become experts and weights: settings of a model, without torch."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the logits of a router become experts and weights.

    Scores are softmax or sigmoid of the logits. With groups, only experts of the
    `num_chosen_groups` best groups can be chosen. The value of a group is the sum of its best
    `group_top` scores (1: its best score). A bias, if there is one, is added only to choose. The
    weights are the scores of the chosen experts, divided by their sum if `normalise`, then times
    `scale`. Source: transformers' modeling_deepseek_v2 and _v3, modeling_qwen3_moe,
    modeling_mixtral.

    "uniform_random" is for benchmarks: scores are a hash of the bits of the logit, the row and the
    expert. So dummy weights give all experts the same load. Biases and groups are ignored.
    """

    top_k: int
    scoring: str  # "softmax", "sigmoid" or "uniform_random"
    normalise: bool
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_top: int = 1

    def uniform(self) -> "Routing":
        """Return a routing with the same number of experts, chosen at random."""
        return replace(
            self,
            scoring="uniform_random",
            normalise=True,
            num_groups=1,
            num_chosen_groups=1,
            group_top=1,
        )
