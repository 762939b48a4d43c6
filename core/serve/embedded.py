"""An engine inside a Python program: the processes of the ranks, and two threads that serve them.

One thread supervises the workers, as the parent of a server does; the other runs the event loop of
the engine's client and of the text service, as a server's frontend does. The program's own thread,
signals and standard streams stay as they are. Knows nothing of HTTP and imports no torch.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import uvloop

from core.cluster.processes.boot import FrontendBoot, worker_name
from core.cluster.processes.process import ProcessSpec
from core.cluster.processes.signals import OwnSignals
from core.cluster.processes.supervisor import Supervisor
from core.errors import (
    ConfigError,
    ModelError,
    NodeweaveError,
    PluginError,
    RequestError,
    ResourceError,
    WorkerDied,
)
from core.frontend.completion import Completion, read_completion
from core.interfaces.control import ChildStatus, Failed, Ready
from core.interfaces.frontend import Tokenizer
from core.interfaces.messages import SamplingParams
from core.interfaces.text import TextService
from core.plugin.plugin_manager import PluginManager
from core.serve.balancer import make_balancer
from core.serve.engine_client import ZmqEngine
from core.serve.request_check import RequestLimits
from core.serve.text.pool import TextPool
from core.serve.text.process import TextBoot
from core.tokenizers.load import load_tokenizer

CLOSED = "the engine was closed"
# What a worker's own error is raised as again, where it ended the start.
_ERRORS = {cls.__name__: cls for cls in (ConfigError, PluginError, ModelError, ResourceError)}
T = TypeVar("T")


class EmbeddedEngine:
    """`open`, then `run` coroutines that use `text` and `generate`; `close` ends all of it."""

    def __init__(
        self,
        boot: FrontendBoot,
        plugins: PluginManager,
        workers: Sequence[ProcessSpec],
        on_status: Callable[[str, ChildStatus], None],
    ) -> None:
        """Starts nothing. `on_status` is called in the supervisor's thread."""
        self._boot = boot
        self._specs = workers
        self._on_status = on_status
        self._error_class: type[NodeweaveError] = WorkerDied
        self._signals = OwnSignals()
        self._opened: Future[None] = Future()
        self._supervising = threading.Thread(
            target=self._supervise, name="nodeweave-supervisor", daemon=True
        )
        self._looping = threading.Thread(target=self._loop_forever, name="nodeweave", daemon=True)
        self._owner_pid = os.getpid()
        self._closing = threading.Lock()
        self._closed = False
        self._left = asyncio.Event()
        self._engine: ZmqEngine | None = None  # from here on used in the event loop's thread only
        self._ids = itertools.count()
        config, served = boot.config, boot.served
        self.limits = RequestLimits(
            vocab_size=served.vocab_size,
            max_model_len=served.max_model_len,
            processors=plugins.table("logits_processor").create_all(config),
        )
        num_schedulers = len(boot.endpoints.steps)
        self._balancer = make_balancer(plugins.table("balancer"), config.parallel, num_schedulers)
        # As many as a server takes; the others wait here, where they cost the scheduler nothing.
        self._room = asyncio.Semaphore(
            config.engine.running_limit * num_schedulers + config.frontend.max_queued_requests
        )
        self.text: TextService
        self.tokenizer: Tokenizer

    def open(self) -> None:
        """Start everything; returns once requests are answered. Raises ConfigError, ModelError or
        ResourceError where a rank or the tokenizer can't be built for that reason, else WorkerDied;
        nothing is left running then."""
        try:
            self._looping.start()
            self._opened.result()
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the event loop, for any other thread. Where this
        is interrupted the coroutine is cancelled."""
        with self._closing:
            if self._closed:
                work.close()
                raise closed()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise closed() from None
        except BaseException:
            future.cancel()
            raise

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, stops: Sequence[str]
    ) -> Completion:
        """One answer. Raises RequestError for what the engine does not take."""
        assert self._engine is not None
        async with self._room:
            stream = self._engine.generate(str(next(self._ids)), prompt_ids, sampling)
            try:
                return await read_completion(stream, self.tokenizer, prompt_ids, sampling, stops)
            finally:
                stream.close()  # aborts what has not finished

    def close(self) -> None:
        """End the workers and the threads; whoever waits for an answer gets WorkerDied. Again, or
        in a fork of the process, it does nothing."""
        with self._closing:
            if self._closed or os.getpid() != self._owner_pid:
                return
            self._closed = True
            self._tell(self._die, CLOSED)
            self._signals.send(signal.SIGTERM)
            if self._supervising.ident is not None:
                self._supervising.join()
            self._tell(self._leave)
            if self._looping.ident is not None:
                self._looping.join()
            if self._supervising.ident is not None:  # begun meanwhile
                self._supervising.join()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Those that `close` can't be called from, as it waits for them."""
        return self._supervising, self._looping

    # In the supervisor's thread.

    def _supervise(self) -> None:
        supervisor = Supervisor(
            self._specs,
            self._boot.config.launch,
            on_status=self._heard,
            on_ready=self._on_ready,
            on_error=lambda text: self._tell(self._die, text),
            signals=self._signals.pipe,
        )
        cause = "the workers ended"
        try:
            supervisor.run()
        except Exception as error:  # the ranks end with this thread
            cause = f"starting or watching the workers failed: {error!r}"
        finally:
            self._tell(self._die, cause)

    def _heard(self, name: str, status: ChildStatus) -> None:
        if isinstance(status, Failed):
            self._error_class = _ERRORS.get(status.kind, self._error_class)
        self._on_status(name, status)

    def _on_ready(self, said: dict[str, Ready]) -> None:
        self._tell(self._ready, said[worker_name(0)].info)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call it in the event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError, AttributeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    # In the event loop's thread.

    def _loop_forever(self) -> None:
        self._loop = uvloop.new_event_loop()
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error)
        finally:
            self._loop.close()

    async def _live(self) -> None:
        boot, loop = self._boot, self._loop
        serving: asyncio.Future[None] = loop.create_future()
        self._serving = serving
        self._engine = engine = ZmqEngine(
            boot.endpoints,
            loop,
            self._balancer,
            self.limits,
            on_serving=lambda: serving.set_result(None),
        )
        text: TextPool | None = None
        try:
            self._supervising.start()
            files = boot.files
            # Built in another process first: what could take all memory ends that one only.
            text = await TextPool.start(
                TextBoot.of(files),
                boot.config.frontend.text_processes,
            )
            self.text = text
            self.tokenizer = load_tokenizer(files.tokenizer, files.tokenizer_dir, files.eos_ids)
            await serving
            self.limits = self.limits.at_most(engine.info.get("max_model_len"))
            self._opened.set_result(None)
            await self._left.wait()
        finally:
            if text is not None:
                text.close()
            await _cancel_others()
            engine.close()

    def _ready(self, info: dict[str, Any]) -> None:
        assert self._engine is not None
        self._engine.engine_ready(info)

    def _die(self, cause: str) -> None:
        """The first cause counts."""
        if self._engine is None:
            return  # closed before it began
        self._engine.engine_died(cause)
        if not self._serving.done():
            self._serving.set_exception(self._error_class(cause))

    def _leave(self) -> None:
        self._left.set()


def closed() -> RequestError:
    """What is said to those who come too late."""
    return RequestError(
        "this LLM is closed and answers nothing any more; make another", code="closed", status=503
    )


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
