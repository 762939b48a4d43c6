"""Registers the attention backend "torch_ref": slow, obviously right, on any device.

Knows nothing of how it computes: plugins.attention._torch_ref.heads does, and
plugins.attention._torch_ref.latent for latent attention.
"""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_attention() -> Sequence[Registration]:
    return [
        Registration(
            name="torch_ref",
            factory="plugins.attention._torch_ref.heads:build",
            summary="float32, one sequence at a time, on any device: for checking the others",
        )
    ]


@hookimpl
def register_latent_attention() -> Sequence[Registration]:
    return [
        Registration(
            name="torch_ref",
            factory="plugins.attention._torch_ref.latent:build",
            summary="float32, one sequence at a time, on any device: for checking the others",
        )
    ]
