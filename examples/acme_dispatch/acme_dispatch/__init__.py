"""The plugin: what it registers and where its configs lie. Importing it does not import torch."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_moe_a2a() -> Sequence[Registration]:
    """One dispatcher, for both phases."""
    return [
        Registration(
            name="acme",
            factory="acme_dispatch.dispatcher:AcmeDispatcher",
            summary="every rank gets all rows, padded; sums are added up over all ranks",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds moe_a2a/acme.yaml."""
    return ["pkg://acme_dispatch.conf"]
