"""Registers the exporters of metrics. Imports none of them: that happens when one is chosen."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_metrics_exporter() -> Sequence[Registration]:
    return [
        Registration(
            name="prometheus",
            factory="plugins.exporters.prometheus:Prometheus",
            summary="GET /metrics, in the text form of Prometheus",
        )
    ]
