"""An exporter that sends: a line of JSON for all that a server counts, appended to a file.

Knows nothing of what is counted. It may block: it runs in a thread of its own, and what it raises
is logged and costs no request.
"""

import time
from collections.abc import Sequence

import msgspec

from acme_metrics import AcmeOptions
from core.interfaces.metrics import ExporterContext, MetricFamily


class JsonLines:
    """Implements core.interfaces.metrics.PushExporter."""

    def __init__(self, options: AcmeOptions, context: ExporterContext) -> None:
        self.interval_s = options.interval_s
        self._file = options.file
        self._model = context.model_name

    def push(self, families: Sequence[MetricFamily]) -> None:
        """Append one line."""
        line = {"time": time.time(), "model": self._model, "families": families}
        with open(self._file, "ab") as lines:
            lines.write(msgspec.json.encode(line) + b"\n")
