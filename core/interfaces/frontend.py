"""The interface between the engine and a frontend plugin. Knows nothing of HTTP or sockets."""

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from core.interfaces.messages import EngineStats, ExpertLoads, RequestOutput, SamplingParams
from core.interfaces.metrics import FrontendMetrics, RequestMeter
from core.interfaces.text import TextService
from core.interfaces.tokenizer import IncrementalDetokenizer as IncrementalDetokenizer
from core.interfaces.tokenizer import Tokenizer as Tokenizer  # part of this contract
from core.settings.config import FrontendConfig


class OutputStream(Protocol):
    """The outputs of one request, in order. The caller of `Engine.generate` must close it."""

    def __aiter__(self) -> "OutputStream": ...

    async def __anext__(self) -> RequestOutput:
        """Wait for the next output and return it.

        Unread outputs are merged, so a slow reader costs no memory. `token_ids` can then have the
        tokens of several steps. Raises StopAsyncIteration after the output with a finish_reason and
        after `close`. Raises WorkerDied if the engine ended before.
        """
        ...

    def close(self, finish_reason: str | None = None) -> None:
        """End the iteration. Aborts the request if it has not finished. Can be called again.

        `finish_reason` is for the metrics, if the reader knows more than the engine: "stop" for a
        stop string. It must be one of few words. None: the reason of the engine, or "abort" if the
        engine has none yet.
        """
        ...


class EngineState(enum.Enum):
    """What an engine does with a request that is submitted now."""

    STARTING = "starting"  # refuses it: the model is loading
    SERVING = "serving"
    DRAINING = "draining"  # refuses it: the server is shutting down
    DEAD = "dead"  # refuses it, permanently: a worker died


class Engine(Protocol):
    """The engine, as a frontend uses it, over any transport."""

    @property
    def state(self) -> EngineState: ...

    @property
    def alive(self) -> bool:
        """Whether all workers run. Permanently False after one died."""
        ...

    @property
    def num_live(self) -> int:
        """Number of requests that were submitted and have neither finished nor been aborted."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest statistics of the engine, summed over its schedulers."""
        ...

    @property
    def stats_by_dp(self) -> Sequence[EngineStats]:
        """The latest statistics of each DP rank's scheduler."""
        ...

    @property
    def expert_loads(self) -> ExpertLoads | None:
        """The latest number of tokens routed to each expert; None if there is none."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What the engine reported when it became ready: plain values. Empty before."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        meter: RequestMeter | None = None,
    ) -> OutputStream:
        """Submit a request. Returns at once, without blocking.

        Waiting requests with the lowest `priority` are computed first. Tokens, times and the end
        are counted while the stream is read. Pass a `meter` if this is one of several answers to
        one client request.

        Raises RequestError: status 503 if the state is not SERVING; 429 if the queue is full; 400
        for everything that could harm a worker. `param` then names the argument or the field of
        `sampling` (core.serve.request_check has all ranges). Frontends need no checks of their own.
        """
        ...


class Admission(Protocol):
    """Limits the number of running and waiting requests of the server.

    `Engine.generate` itself refuses too many requests, with 429. A frontend that asks here before
    it tokenizes saves that work, and the requests that it tokenizes are counted.
    """

    max_live: int

    def admit(self, num_requests: int) -> None:
        """Raise RequestError if so many more do not fit: 429; 400 if they could never fit."""
        ...

    def submitting(self, num_requests: int) -> AbstractContextManager[Callable[[], None]]:
        """Count admitted requests until they are submitted. Call the value after each one."""
        ...

    def tokenizing(self, num_requests: int) -> AbstractContextManager[None]:
        """Use around the tokenizing of so many requests. Raises RequestError as `admit` does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a frontend may tell clients about the model."""

    name: str
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int
    created: int  # Unix seconds
    info: dict[str, Any]  # plain values, for /server_info
    default_sampling: dict[str, float]  # from generation_config.json: temperature, top_p, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendContext:
    """Everything that a frontend is built from."""

    engine: Engine
    tokenizer: Tokenizer  # for ids to text, token by token
    text: TextService  # for text to ids
    model: ServedModel
    config: FrontendConfig
    max_running_requests: int
    metrics: FrontendMetrics
    admission: Admission
    own_routes: Sequence[str] = ()  # paths that the server answers itself: probes, metrics


FrontendFactory = Callable[[FrontendContext], Any]  # returns an ASGI application
