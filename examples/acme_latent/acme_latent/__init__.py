"""The plugin: what it registers and where its configs lie. Importing it does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """attention.<phase>.options of this backend."""

    part_tokens: int = 1024  # most cached tokens whose keys and values are in memory at once

    def __post_init__(self) -> None:
        if self.part_tokens < 1:
            raise ValueError(f"part_tokens={self.part_tokens} is out of range; allowed: at least 1")


@hookimpl
def register_latent_attention() -> Sequence[Registration]:
    """One backend, for both phases."""
    return [
        Registration(
            name="acme_latent",
            factory="acme_latent.backend:AcmeLatent",
            config=AcmeOptions,
            summary="sequence by sequence, some tokens at a time, in float32",
        )
    ]
