"""The plugin: what it registers. Importing it does not import torch."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_checkpoint_format() -> Sequence[Registration]:
    """One format."""
    return [
        Registration(
            name="npy",
            factory="acme_checkpoint.npy:NpyFormat",
            summary="a Hugging Face folder whose weights are weights/NAME.npy",
        )
    ]
