"""The plugin: metrics as lines of JSON in a file."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """metrics.options.acme."""

    file: str  # appended to
    interval_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval_s <= 86400:
            raise ValueError(f"interval_s={self.interval_s} is out of range; allowed: 0.1 to 86400")


@hookimpl
def register_metrics_exporter() -> Sequence[Registration]:
    """One exporter."""
    return [
        Registration(
            name="acme",
            factory="acme_metrics.json_lines:JsonLines",
            config=AcmeOptions,
            summary="a line of JSON every few seconds, in a file",
        )
    ]
