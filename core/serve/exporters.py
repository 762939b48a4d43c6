"""The chosen exporters of metrics: built, asked by their routes, and given what they send.

Each has a thread of its own, so that one that is slow, fails or never returns costs a scrape or a
push, and no request anything. Knows nothing of what is counted.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from core.errors import ConfigError, PluginError, RequestError
from core.interfaces.http import PROBES
from core.interfaces.metrics import ExporterContext, MetricFamily, PushExporter, ScrapeExporter
from core.plugin.plugin_manager import PluginTable
from core.serve.own_routes import Answer, OwnRoute, plain_path
from core.serve.side_thread import SideThread
from core.settings.config import MetricsConfig, PluginChoice

RENDER_S = 10.0  # that an exporter may take for one scrape
MAX_WAITING = 8  # scrapes of one exporter that wait for its thread
STUCK_S = 60.0  # of a push, after which it is told once
FLUSH_S = 0.5  # for the last push, when the server ends
SHORTEST_INTERVAL_S = 0.01

Collect = Callable[[], Sequence[MetricFamily]]
log = logging.getLogger(__name__)


class Exporters:
    """`routes` by path; `start` begins pushing in the running event loop, `close` ends it."""

    def __init__(self, exporters: Mapping[str, Any], collect: Collect) -> None:
        """`exporters` by name. Raises PluginError for one that keeps neither contract, or whose
        route is another's."""
        self.routes: dict[str, OwnRoute] = {}
        self._pushing: list[_Pushing] = []
        self._tasks: list[asyncio.Task[None]] = []
        for name, exporter in exporters.items():
            _check(name, exporter)
            thread = SideThread(f"exporter-{name}")
            if isinstance(exporter, ScrapeExporter):
                if exporter.path in (*PROBES, *self.routes):
                    raise PluginError(
                        f"metrics.exporters: {name!r} has the route {exporter.path!r}, which is "
                        "there already; leave one of them out"
                    )
                self.routes[exporter.path] = _Scrapes(name, exporter, collect, thread).answer
            if isinstance(exporter, PushExporter):
                self._pushing.append(_Pushing(name, exporter, collect, thread))

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(pushing.run()) for pushing in self._pushing]

    async def close(self) -> None:
        """Push once more what was counted since, if that is quick."""
        for task in self._tasks:
            task.cancel()
        last = [pushing.push() for pushing in self._pushing if not pushing.is_busy]
        if last:
            await asyncio.wait([asyncio.ensure_future(each) for each in last], timeout=FLUSH_S)


def make_exporters(
    table: PluginTable, config: MetricsConfig, context: ExporterContext, collect: Collect
) -> Exporters:
    """Those that the configuration names. Raises PluginError where one can't be built."""
    made = {}
    for name in config.exporters:
        choice = PluginChoice(name=name, options=config.options.get(name, {}))
        try:
            made[name] = table.create(choice, context, options_key=f"metrics.options.{name}")
        except ConfigError:
            raise
        except Exception as error:  # whatever a third party's factory raises
            raise PluginError(
                f"metrics_exporter plugin {name!r} (from {table.plugin_of(name)}) "
                f"can't be built: {type(error).__name__}: {error}\n"
                "start without it: leave it out of metrics.exporters"
            ) from error
    return Exporters(made, collect)


def _check(name: str, exporter: Any) -> None:
    is_scraped, is_push = isinstance(exporter, ScrapeExporter), isinstance(exporter, PushExporter)
    wrong = None
    if not (is_scraped or is_push):
        wrong = "has neither path, content_type and render, nor interval_s and push"
    elif is_scraped and not _is_plain(exporter.path):
        wrong = (
            f"has the path {exporter.path!r}; it must begin with one / and end without, as paths "
            "of requests are read"
        )
    elif is_push and not _is_long(exporter.interval_s):
        wrong = f"has interval_s={exporter.interval_s!r}; allowed: at least {SHORTEST_INTERVAL_S}"
    if wrong is not None:
        raise PluginError(
            f"metrics_exporter plugin {name!r} {wrong} (core.interfaces.metrics says what an "
            "exporter is)"
        )


def _is_plain(path: Any) -> bool:
    return isinstance(path, str) and path.startswith("/") and plain_path(path) == path


def _is_long(interval_s: Any) -> bool:
    return isinstance(interval_s, int | float) and interval_s >= SHORTEST_INTERVAL_S


class _Scrapes:
    """The route of one exporter."""

    def __init__(
        self, name: str, exporter: ScrapeExporter, collect: Collect, thread: SideThread
    ) -> None:
        self._name = name
        self._exporter = exporter
        self._collect = collect
        self._thread = thread

    async def answer(self) -> Answer:
        """Raises RequestError where it can't be had."""
        if self._thread.num_jobs >= MAX_WAITING:
            raise self._too_slow()
        render = partial(self._exporter.render, self._collect())
        try:
            body = await asyncio.wait_for(self._thread.run(render), RENDER_S)
            return Answer(self._exporter.content_type.encode(), bytes(memoryview(body)))
        except TimeoutError as error:
            raise self._too_slow() from error
        except Exception as error:
            log.error("the metrics exporter %r failed", self._name, exc_info=error)
            message = f"the metrics exporter {self._name!r} failed; see the server's log"
            raise RequestError(message, code="exporter_failed", status=500) from error

    def _too_slow(self) -> RequestError:
        message = f"the metrics exporter {self._name!r} takes too long"
        return RequestError(message, code="exporter_timeout", status=503)


class _Pushing:
    """What is sent by one exporter, again and again."""

    def __init__(
        self, name: str, exporter: PushExporter, collect: Collect, thread: SideThread
    ) -> None:
        self._name = name
        self._exporter = exporter
        self._collect = collect
        self._thread = thread
        self._failing = False

    @property
    def is_busy(self) -> bool:
        return self._thread.num_jobs > 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._exporter.interval_s)
            await self.push()

    async def push(self) -> None:
        """Returns once it was done, whether it worked or not."""
        future = self._thread.run(partial(self._exporter.push, self._collect()))
        done, _ = await asyncio.wait([future], timeout=STUCK_S)
        if not done:
            log.warning("the metrics exporter %r has been sending for %g s", self._name, STUCK_S)
            await asyncio.wait([future])
        error, name = future.exception(), self._name
        if error is not None and not self._failing:
            log.error("the metrics exporter %r failed; it is tried again", name, exc_info=error)
        elif error is None and self._failing:
            log.info("the metrics exporter %r works again", name)
        self._failing = error is not None
