"""The real HTTP layer over a fake engine, in this process: uvicorn in a thread, ZeroMQ between."""

import asyncio
import concurrent.futures
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from core.frontend.admission import Admission
from core.interfaces.balancer import Balancer, BalancerSpec
from core.interfaces.frontend import EngineState, FrontendContext, FrontendFactory, ServedModel
from core.interfaces.http import PROBES, HttpStats, RequestRecord
from core.interfaces.messages import Generate
from core.interfaces.metrics import ExporterContext
from core.plugin.hookspecs import NoOptions
from core.serve.around import around
from core.serve.balancer import GuardedBalancer
from core.serve.counts import Counts
from core.serve.engine_client import ZmqEngine
from core.serve.exporters import Exporters
from core.serve.http.limits import HttpLimits
from core.serve.http.server import Server, bind, url_of
from core.serve.loop_watch import LoopWatch
from core.serve.metrics import ServerMetrics
from core.serve.request_check import RequestLimits
from core.serve.text.pool import TextPool
from core.serve.text.process import TextBoot
from core.settings.config import FrontendConfig
from plugins.balancers.round_robin import RoundRobin
from plugins.exporters.prometheus import Prometheus
from plugins.frontends._openai.app import create_app
from plugins.logits_processors.allowed import AllowedTokenIds
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.fake_engine import FakeEngine, endpoints_in
from tests.support.small_tokenizer import SMOLLM2_TEMPLATE, write_folder

MODEL = "fake-model"
MAX_MODEL_LEN = 512
ANSWER = "The capital of France is Paris. 🎉 STOP and go on"
OPENAI = partial(create_app, NoOptions())


class Stack:
    """A context manager. `engine` is the fake one (of several DP ranks the first); the frontend's
    side is reached by `call`."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        max_running_requests: int = 64,
        default_sampling: dict[str, float] | None = None,
        serving: bool = True,
        num_dp: int = 1,
        vocab_size: int | None = None,
        template: str = SMOLLM2_TEMPLATE,
        text_limits: dict[str, float] | None = None,
        factory: FrontendFactory = OPENAI,
        exporters: dict[str, Any] | None = None,
        balancer: Balancer | None = None,
        **frontend: Any,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self.endpoints = endpoints_in(folder, num_dp)
        written = write_folder(folder / "tokenizer", template=template)
        self.tokenizer = HfTokenizer.from_folder(written)
        self.text_boot = TextBoot(folder=str(written), eos_ids=[], **(text_limits or {}))
        self.answer_ids = self.tokenizer.encode(ANSWER)
        self.engines = [
            FakeEngine(self.endpoints, self.reply, self.tokenizer.eos_ids[0], dp_rank)
            for dp_rank in range(num_dp)
        ]
        self.engine = self.engines[0]
        # Rows of the model's embedding; None: as many as the tokenizer has.
        self._vocab_size = vocab_size or self.tokenizer.vocab_size
        self._serving = serving
        self._config = FrontendConfig(port=0, **frontend)
        self._api_key = api_key
        self._factory = factory
        self._balancer = balancer
        prometheus = Prometheus(NoOptions(), ExporterContext(model_name=MODEL))
        self._exporters = {"prometheus": prometheus} if exporters is None else exporters
        self._max_running_requests = max_running_requests
        self._default_sampling = default_sampling or {}
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), daemon=True)

    def reply(self, request: Generate) -> Sequence[int]:
        """Every answer is ANSWER; tests may set `engine.reply` to another function."""
        return self.answer_ids

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        num_dp = len(self.engines)
        plain = self._balancer or RoundRobin(NoOptions(), BalancerSpec(num_dp, 64))
        balancer = GuardedBalancer("of the test", plain, num_dp)
        self.counts = Counts()
        max_live = self._max_running_requests + self._config.max_queued_requests
        self.client = ZmqEngine(
            self.endpoints,
            self._loop,
            balancer,
            RequestLimits(
                vocab_size=self._vocab_size,
                max_model_len=MAX_MODEL_LEN,
                processors={"allowed_token_ids": AllowedTokenIds()},
            ),
            counts=self.counts,
            max_live=max_live,
        )
        self.text = await TextPool.start(self.text_boot, self._config.text_processes)
        self.http = http = HttpStats()
        metrics = ServerMetrics(MODEL, self.client, self.counts, http, lambda: 0)
        exporters = Exporters(self._exporters, metrics.collect)
        context = FrontendContext(
            engine=self.client,
            tokenizer=self.tokenizer,
            text=self.text,
            model=ServedModel(
                name=MODEL,
                max_model_len=MAX_MODEL_LEN,
                vocab_size=self._vocab_size,
                created=1,
                info={"architecture": "Fake"},
                default_sampling=self._default_sampling,
            ),
            config=self._config,
            max_running_requests=self._max_running_requests,
            metrics=self.counts,
            admission=Admission(self.client, max_live),
            own_routes=(*PROBES, *exporters.routes),
        )
        self.records: list[RequestRecord] = []
        app = around(self._factory(context), context, exporters.routes, self._api_key)
        listener = bind(self._config.host, 0)
        self.url = url_of(listener)
        self._server = Server(
            app,
            limits=HttpLimits(idle_s=5, max_body_bytes=self._config.max_body_bytes),
            stats=http,
            on_end=self.records.append,
            on_started=self._started.set,
        )
        LoopWatch(self.counts.loop_blocked_s).start()
        exporters.start()
        await self._server.serve(sockets=[listener])
        await exporters.close()
        self.text.close()
        self.client.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the frontend's event loop."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return future.result(10)

    def reset(self) -> None:
        """Back to the answer and pace a test begins with."""
        self.engine.reply = self.reply
        self.engine.stepping.set()
        self.engine.permits = None
        self.engine.steps_per_second = 0.0
        with self.engine.changed:
            self.engine.seen.clear()
            self.engine.aborted.clear()

    def __enter__(self) -> "Stack":
        self._thread.start()
        assert self._started.wait(20)
        if self._serving:
            for engine in self.engines:
                engine.start()
            self.call(self.client.engine_ready, {})
            while self.client.state is EngineState.STARTING:
                self.call(lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        assert not self._thread.is_alive(), "the server did not end"
        for engine in self.engines:
            engine.stop()
        self._folder.cleanup()
