"""The frontend process: `python -m core.serve.process`, started by the supervisor of node 0.

Boots from one line on standard input (`FrontendBoot`), binds the port before anything slow,
loads the tokenizer and the frontend plugin, and serves until it is told to drain or its parent
is gone. Knows nothing of models, weights or devices: it imports neither torch nor transformers.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from core.cluster.processes.boot import FrontendBoot
from core.cluster.processes.channel import Channel, exit_with_parent, outlive_parent
from core.cluster.processes.log_stream import LogWriter, steady_output
from core.cluster.processes.machine import raise_descriptor_limit
from core.cluster.processes.signals import leave_signals_to_parent
from core.devices.cpu.host_memory import give_back_freed_memory
from core.errors import ConfigError, RequestError
from core.frontend.admission import Admission
from core.interfaces.control import (
    Drain,
    EngineDied,
    EngineReady,
    LinesDropped,
    ParentControl,
    Ready,
    StartPhase,
)
from core.interfaces.frontend import EngineState, FrontendContext, ServedModel
from core.interfaces.http import PROBES, HttpStats
from core.interfaces.metrics import ExporterContext
from core.plugin.plugin_manager import PluginManager
from core.serve.access_log import AccessLog, access_log
from core.serve.around import around
from core.serve.balancer import make_balancer
from core.serve.counts import Counts
from core.serve.engine_client import ZmqEngine
from core.serve.exporters import make_exporters
from core.serve.http.limits import HttpLimits, settle_connections
from core.serve.http.server import Server, bind, is_loopback, url_of
from core.serve.lookout import LOOK_S, Lookout
from core.serve.loop_watch import LoopWatch
from core.serve.metrics import ServerMetrics
from core.serve.request_check import RequestLimits, size_problem
from core.serve.text.pool import TextPool
from core.serve.text.process import TextBoot
from core.settings.config import FrontendConfig, PluginChoice
from core.tokenizers.load import load_tokenizer

API_KEY_VARIABLE = "NODEWEAVE_API_KEY"
FAREWELL_S = 0.25  # of answering with the cause after the engine died; the parent kills after 1.5 s
ABANDONED_S = 4  # to tell clients and end, once the parent is gone
PARENT_GONE = "its parent process is gone"

log = logging.getLogger(__name__)


def read_api_key(config: FrontendConfig) -> str | None:
    """The key from `frontend.api_key_file`, else from the environment, else None.

    Raises ConfigError for a file that can't be read or holds nothing.
    """
    if config.api_key_file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        key = Path(config.api_key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"frontend.api_key_file={config.api_key_file!r}: {error}") from error
    if not key:
        raise ConfigError(f"frontend.api_key_file={config.api_key_file!r} is empty")
    return key


def check_exposure(config: FrontendConfig, api_key: str | None) -> None:
    """Raise ConfigError where anybody on the network could use the endpoint unasked."""
    if api_key is None and not config.allow_anonymous and not is_loopback(config.host):
        raise ConfigError(
            f"frontend.host={config.host!r} is reachable from other machines and there is no API "
            f"key; set frontend.api_key_file (or {API_KEY_VARIABLE}), bind 127.0.0.1, or accept "
            "anybody with frontend.allow_anonymous=true"
        )


def shutting_down() -> RequestError:
    """What those are told whose answer was not finished in time: nothing broke, try another."""
    message = "the server is shutting down and its grace time is over"
    return RequestError(message, code="shutting_down", status=503)


class Frontend:
    """One running frontend: the engine client, the server, and what the parent asks for."""

    def __init__(
        self,
        channel: Channel,
        boot: FrontendBoot,
        api_key: str | None,
        limits: HttpLimits,
        access_log: AccessLog,
        own_dropped_lines: Callable[[], int],
    ) -> None:
        self._channel = channel
        self._boot = boot
        self._api_key = api_key
        self._own_dropped_lines = own_dropped_lines
        self._dropped_lines_elsewhere = 0
        self._limits = limits
        self._access_log = access_log
        self._http = HttpStats()
        self._counts = Counts()
        # Every DP rank has a batch of its own.
        self._max_running = boot.config.engine.running_limit * len(boot.endpoints.steps)
        self._max_live = self._max_running + boot.config.frontend.max_queued_requests
        self._drain_task: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> int:
        """Serve until drained or abandoned; returns the exit status."""
        config = self._boot.config
        loop = asyncio.get_running_loop()
        endpoints = self._boot.endpoints
        served = self._boot.served
        plugins = PluginManager.load(config.plugins.blocklist)
        balancer = make_balancer(plugins.table("balancer"), config.parallel, len(endpoints.steps))
        limits = RequestLimits(
            vocab_size=served.vocab_size,
            max_model_len=served.max_model_len,
            processors=plugins.table("logits_processor").create_all(config),
        )
        self._engine = ZmqEngine(
            endpoints,
            loop,
            balancer,
            limits,
            queue_timeout_s=config.frontend.queue_timeout_s,
            on_serving=self._tell_ready,
            counts=self._counts,
            max_live=self._max_live,
        )
        application = await self._application(plugins)
        self._url = url_of(listener)
        self._server = Server(
            application,
            limits=self._limits,
            stats=self._http,
            on_end=self._access_log,
            on_started=self._tell_ready,
        )
        self._exit_status = 0

        def on_message(message: ParentControl | None) -> None:
            if message is None:
                signal.alarm(ABANDONED_S)  # the kernel ends this process if its loop hangs
            loop.call_soon_threadsafe(self._handle, message)

        self._channel.listen(on_message)
        outlive_parent()
        # The terminal's ctrl-c reaches every process of the group; the parent decides for all.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        grace = Drain(config.launch.shutdown_grace_s)
        loop.add_signal_handler(signal.SIGTERM, self._handle, grace)
        gc.collect()
        gc.freeze()  # nothing made until here is garbage: keep it out of every collection
        gc.set_threshold(20_000, 20, 50)
        LoopWatch(self._counts.loop_blocked_s).start()
        self._exporters.start()
        await self._server.serve(sockets=[listener])
        await self._exporters.close()
        self._text.close()
        self._engine.close()
        return self._exit_status if self._engine.alive else 1

    def _tell_ready(self) -> None:
        """Once a request that is sent now would be answered: the parent shows the URL then."""
        if self._server.started and self._engine.state is EngineState.SERVING:
            self._channel.send(Ready({"url": self._url, "needs_key": self._api_key is not None}))

    async def _application(self, plugins: PluginManager) -> Any:
        """The chosen frontend plugin's ASGI application, guarded."""
        config, served = self._boot.config, self._boot.served
        begin = time.monotonic()
        files = self._boot.files
        # Built there first: what could take for ever, or all memory, ends that process only.
        boot = TextBoot.of(files)
        self._text = await TextPool.start(boot, config.frontend.text_processes)
        tokenizer = load_tokenizer(files.tokenizer, files.tokenizer_dir, files.eos_ids)
        if (problem := size_problem(tokenizer, served.vocab_size)) is not None:
            log.warning("%s", problem)
        metrics = ServerMetrics(
            served.name,
            self._engine,
            self._counts,
            self._http,
            lambda: self._own_dropped_lines() + self._dropped_lines_elsewhere,
        )
        self._exporters = make_exporters(
            plugins.table("metrics_exporter"),
            config.metrics,
            ExporterContext(model_name=served.name),
            metrics.collect,
        )
        context = FrontendContext(
            engine=self._engine,
            tokenizer=tokenizer,
            text=self._text,
            model=ServedModel(
                name=served.name,
                max_model_len=served.max_model_len,
                vocab_size=served.vocab_size,
                created=int(time.time()),
                info=served.info,
                default_sampling={
                    **self._boot.files.default_sampling,
                    **config.model.default_sampling,
                },
            ),
            config=config.frontend,
            max_running_requests=self._max_running,
            metrics=self._counts,
            admission=Admission(self._engine, self._max_live),
            own_routes=(*PROBES, *self._exporters.routes),
        )
        choice = PluginChoice(name=config.frontend.name, options=config.frontend.options)
        application = plugins.table("frontend").create(choice, context)
        self._channel.send(StartPhase("frontend", time.monotonic() - begin))
        return around(application, context, self._exporters.routes, self._api_key)

    def _handle(self, message: ParentControl | None) -> None:
        if isinstance(message, EngineReady):
            self._engine.engine_ready(message.info)
            self._watch(message.workers)
        elif isinstance(message, EngineDied):
            self._engine.engine_died(message.cause)
            asyncio.get_running_loop().call_later(FAREWELL_S, self._exit)
        elif isinstance(message, LinesDropped):
            self._dropped_lines_elsewhere = message.lines
        elif isinstance(message, Drain):
            if self._drain_task is not None:
                self._drain_task.cancel()  # a second request counts from now
            self._drain_task = asyncio.get_running_loop().create_task(self._drain(message.grace_s))
        elif not self._server.should_exit:  # the parent is gone, or wants us gone
            self._exit_status = 1
            self._engine.engine_died(PARENT_GONE)
            self._exit()

    def _watch(self, workers: Mapping[str, int]) -> None:
        """Look after the workers as well; the parent is faster and knows more, while it runs."""
        config = self._boot.config.cluster
        several_nodes = bool(self._boot.endpoints.key)
        lookout = Lookout(
            workers,
            os.getppid(),
            parent_limit_s=config.heartbeat_timeout_s if several_nodes else math.inf,
        )
        loop = asyncio.get_running_loop()

        def look() -> None:
            cause = lookout.look()
            if cause is None:
                loop.call_later(LOOK_S, look)
            else:  # the parent ends this process, when it can
                self._engine.engine_died(cause)

        look()

    def _exit(self) -> None:
        self._server.should_exit = True

    async def _drain(self, grace_s: float) -> None:
        self._engine.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._engine.wait_idle()
        except TimeoutError:
            self._engine.fail_all(shutting_down)
        self._exit()


def run(channel: Channel, boot: FrontendBoot, output: LogWriter) -> int:
    """Check, bind, serve. Raises the errors of core.errors."""
    frontend = boot.config.frontend
    api_key = read_api_key(frontend)
    check_exposure(frontend, api_key)
    limits = HttpLimits.of(
        frontend, settle_connections(frontend.max_connections, raise_descriptor_limit())
    )
    listener = bind(frontend.host, frontend.port)
    # A pipe that nobody reads must not hold up a file.
    log_output = output if frontend.access_log_file is None else LogWriter()
    running = Frontend(
        channel,
        boot,
        api_key,
        limits,
        access_log(frontend, log_output),
        lambda: sum(writer.dropped for writer in {output, log_output}),
    )
    try:
        return uvloop.run(running.run(listener))
    finally:
        log_output.close()


def main() -> int:
    channel = Channel.open()
    exit_with_parent()
    leave_signals_to_parent()  # until the server is up
    give_back_freed_memory()  # bodies and answers of many MiB come and go
    try:
        boot = msgspec.json.decode(channel.boot_line(), type=FrontendBoot)
        with steady_output() as log:
            return run(channel, boot, log)
    except Exception as error:  # reported by the parent, once, for all its processes
        return channel.report_failure(error)


if __name__ == "__main__":
    sys.exit(main())
