"""Registers the OpenAI-compatible frontend. Imports nothing of it: that happens when chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class OpenAIOptions:
    """`frontend.options.*` of this frontend."""

    # Host headers accepted besides localhost's where the server is bound to loopback, for a
    # proxy on this machine that passes its own name on.
    allowed_hosts: list[str] = field(default_factory=list)


@hookimpl
def register_frontend() -> Sequence[Registration]:
    return [
        Registration(
            name="openai",
            factory="plugins.frontends._openai.app:create_app",
            config=OpenAIOptions,
            summary="OpenAI's API: chat, completions, tokenize, metrics",
        )
    ]
