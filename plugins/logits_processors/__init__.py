"""Logits processors that every server has. Requests name them.

See docs/plugins/logits_processor.md.
"""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_logits_processor() -> Sequence[Registration]:
    """The processors in this package."""
    return [
        Registration(
            name="allowed_token_ids",
            factory="plugins.logits_processors.allowed:make_allowed",
            summary="answers are made of the tokens that are named, and of no others",
        )
    ]
