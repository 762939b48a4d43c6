"""The plugin: what it registers. Importing it does not import torch."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_logits_processor() -> Sequence[Registration]:
    """One processor, for requests that name it."""
    return [
        Registration(
            name="no_repeat_ngram",
            factory="acme_sampling.ngram:no_repeat_ngram",
            summary="no n tokens in a row come twice",
        )
    ]
