"""The plugin: what it registers. Importing it imports no balancer."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """parallel.dp_balancer_options of this balancer."""

    num_blocks: int = 4  # of a prompt's beginning, which are looked at
    most_over_mean: float = 1.5  # live requests of a rank, as a multiple of the mean rank's

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks} is out of range; allowed: at least 1")
        if not self.most_over_mean >= 1:
            raise ValueError(
                f"most_over_mean={self.most_over_mean} is out of range; allowed: at least 1"
            )


@hookimpl
def register_balancer() -> Sequence[Registration]:
    """One balancer."""
    return [
        Registration(
            name="acme",
            factory="acme_balancer.rendezvous:Rendezvous",
            config=AcmeOptions,
            summary="the rank that the prompt's beginning hashes to, within bounds",
        )
    ]
