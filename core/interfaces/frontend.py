"""What a frontend plugin gets and fills. Knows nothing of HTTP or of sockets."""

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
    """The outputs of one request, in order. Whoever got it from `Engine.generate` closes it."""

    def __aiter__(self) -> "OutputStream": ...

    async def __anext__(self) -> RequestOutput:
        """The next output. One that waits unread is merged with what follows, so that a slow
        reader costs no memory; `token_ids` may then hold several steps' tokens.

        Raises StopAsyncIteration after the output with a finish_reason or after `close`, and
        WorkerDied where the engine ended before.
        """
        ...

    def close(self, finish_reason: str | None = None) -> None:
        """End the iteration. Aborts the request unless it finished. May be called again.

        `finish_reason`, one of few words, is what metrics count where the reader knows better than
        the engine: "stop" for a stop string. None: the engine's, or "abort" where it has none yet.
        """
        ...


class EngineState(enum.Enum):
    """What an engine does with a request submitted now."""

    STARTING = "starting"  # refuses it: the model is being loaded
    SERVING = "serving"
    DRAINING = "draining"  # refuses it: the server is shutting down
    DEAD = "dead"  # refuses it, for good: a worker died


class Engine(Protocol):
    """The engine as a frontend sees it, over whatever transport."""

    @property
    def state(self) -> EngineState: ...

    @property
    def alive(self) -> bool:
        """Whether every worker runs; False for good once one died."""
        ...

    @property
    def num_live(self) -> int:
        """Requests submitted and neither finished nor aborted."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest gauges the engine sent, summed over its schedulers."""
        ...

    @property
    def stats_by_dp(self) -> Sequence[EngineStats]:
        """The same of each DP rank's scheduler."""
        ...

    @property
    def expert_loads(self) -> ExpertLoads | None:
        """The latest rows of each expert that the engine sent; None where it has none."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What the engine said of itself when it was ready: plain values; empty before."""
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
        """Submit a request, at once and without blocking. Of those that wait the ones with the
        lowest `priority` are computed first. Its tokens, times and end are counted as it is read;
        `meter` is given where it is one of several answers to one request.

        Raises RequestError: status 503 unless the state is SERVING; 429 where the queue is full;
        status 400 for anything that
        could hurt a worker, with `param` naming the argument or the field of `sampling`
        (core.serve.request_check has every range). Frontends need no checks of their own.
        """
        ...


class Admission(Protocol):
    """How many requests the server takes at once: those that run and those that wait.

    `Engine.generate` refuses what is too much by itself, with 429. A frontend that asks here before
    it tokenizes saves that work, and counts what it tokenizes.
    """

    max_live: int

    def admit(self, num_requests: int) -> None:
        """Raise RequestError where that many more don't fit: 429, or 400 where they never could."""
        ...

    def submitting(self, num_requests: int) -> AbstractContextManager[Callable[[], None]]:
        """Counts admitted requests until each is submitted: the value is called after each."""
        ...

    def tokenizing(self, num_requests: int) -> AbstractContextManager[None]:
        """Around the work that comes before so many requests: refuses as `admit` does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a frontend may say about the model."""

    name: str
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int
    created: int  # Unix seconds
    info: dict[str, Any]  # plain values, for /server_info
    default_sampling: dict[str, float]  # from generation_config.json: temperature, top_p, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendContext:
    """All a frontend is built from."""

    engine: Engine
    tokenizer: Tokenizer  # for ids to text, token by token
    text: TextService  # for text to ids
    model: ServedModel
    config: FrontendConfig
    max_running_requests: int
    metrics: FrontendMetrics
    admission: Admission
    pages: Sequence[str] = ()  # paths that are answered before any frontend: probes, metrics


FrontendFactory = Callable[[FrontendContext], Any]  # returns an ASGI application
