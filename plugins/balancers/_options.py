"""Options of balancers. Apart from them, so that reading options imports no balancer."""

from dataclasses import dataclass

from core.settings.config import require_range


@dataclass(slots=True, kw_only=True)
class PrefixAwareOptions:
    """What a rank's memory of prompts holds, and what it is worth."""

    blocks_per_rank: int = 16_384  # a million tokens of prompts, in blocks of 64
    # How much more loaded the rank that knows a prefix may be, besides what the prefix saves it.
    most_extra_load: float = 0.25

    def __post_init__(self) -> None:
        require_range("parallel.dp_balancer_options.blocks_per_rank", self.blocks_per_rank, 1)
        require_range("parallel.dp_balancer_options.most_extra_load", self.most_extra_load, 0)
