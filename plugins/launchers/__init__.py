"""Launchers: `local` runs every rank on this machine."""

from collections.abc import Sequence

from core.hookspecs import Registration, hookimpl
from plugins.launchers.local import LocalOptions


@hookimpl
def register_launcher() -> Sequence[Registration]:
    """The launchers in this package."""
    return [
        Registration(
            name="local",
            factory="plugins.launchers.local:LocalLauncher",
            config=LocalOptions,
            summary="every rank on this machine, one process each",
        )
    ]
