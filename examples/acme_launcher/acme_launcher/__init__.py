"""The plugin: what it registers and where its configs lie. Importing it does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """launch.options of this launcher."""

    base_port: int = 20000  # first port of the engine, on node 0

    def __post_init__(self) -> None:
        if not 1 <= self.base_port <= 65535:
            raise ValueError(f"base_port={self.base_port} is out of range; allowed: 1 to 65535")


@hookimpl
def register_launcher() -> Sequence[Registration]:
    """One launcher."""
    return [
        Registration(
            name="acme",
            factory="acme_launcher.launcher:make_launcher",
            config=AcmeOptions,
            summary="nodes of a PyTorchJob, from the variables that it sets",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds launch/acme.yaml."""
    return ["pkg://acme_launcher.conf"]
