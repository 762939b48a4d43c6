"""The plugin: a frontend with one route of plain text."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """frontend.options of this frontend."""

    default_max_tokens: int = 256  # of a request that does not say

    def __post_init__(self) -> None:
        if self.default_max_tokens < 1:
            raise ValueError(
                f"default_max_tokens={self.default_max_tokens} is out of range; allowed: at least 1"
            )


@hookimpl
def register_frontend() -> Sequence[Registration]:
    """One frontend."""
    return [
        Registration(
            name="acme",
            factory="acme_frontend.app:create_app",
            config=AcmeOptions,
            summary="POST /generate: a prompt in, plain text out",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds frontend/acme.yaml."""
    return ["pkg://acme_frontend.conf"]
