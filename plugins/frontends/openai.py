"""Registers the OpenAI-compatible frontend. Imports nothing of it: that happens when chosen."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_frontend() -> Sequence[Registration]:
    return [
        Registration(
            name="openai",
            factory="plugins.frontends._openai.app:create_app",
            summary="OpenAI's API: chat, completions, tokenize, metrics",
        )
    ]
