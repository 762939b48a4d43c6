"""The plugin: what it registers and where its configs lie. Importing it does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """attention.<phase>.options of this backend."""

    query_block: int = 256  # most query rows whose scores are held in memory at once

    def __post_init__(self) -> None:
        if self.query_block < 1:
            raise ValueError(f"query_block={self.query_block} is out of range; allowed: at least 1")


@hookimpl
def register_attention() -> Sequence[Registration]:
    """One backend, for both phases."""
    return [
        Registration(
            name="acme",
            factory="acme_attention.backend:AcmeAttention",
            config=AcmeOptions,
            summary="torch's scaled_dot_product_attention, sequence by sequence",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds attention/acme.yaml."""
    return ["pkg://acme_attention.conf"]
