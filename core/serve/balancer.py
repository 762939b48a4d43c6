"""Which DP rank gets a request: makes the chosen balancer, and stands between it and the engine.

A balancer is a plugin and may fail; here that costs the request it was asked about, or nothing.
Knows nothing of how one chooses.
"""

import logging
import operator
import time
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

from core.errors import ConfigError, PluginError, RequestError
from core.interfaces.balancer import Balancer, BalancerSpec, RequestView
from core.interfaces.messages import EngineStats, SamplingParams
from core.plugin.plugin_manager import PluginTable
from core.settings.config import ParallelConfig, PluginChoice

# A prefix is looked up in blocks: smaller ones find more and cost more time in the frontend.
BLOCK_TOKENS = 64
OPTIONS_KEY = "parallel.dp_balancer_options"
QUIET_S = 60.0  # between two lines in the log about one method that fails
_METHODS = ("add", "progress", "remove")
_FAILURES = (Exception, SystemExit)  # what would end the event loop's thread as well

log = logging.getLogger(__name__)


class SoloBalancer:
    """There is one DP rank."""

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        return 0

    def progress(self, request_id: str, num_tokens: int) -> None:
        pass

    def remove(self, request_id: str, *, finished: bool) -> None:
        pass


class GuardedBalancer:
    """A plugin's balancer; what it does wrong is told with its name and ends no event loop.

    `add` raises RequestError (status 500) where it can't say which rank; `progress` and `remove`
    raise nothing.
    """

    def __init__(self, name: str, balancer: Balancer, num_ranks: int) -> None:
        self._name = name
        self._balancer = balancer
        self._num_ranks = num_ranks
        self._told_at_s: dict[str, float] = {}  # of methods that failed: when that was logged

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        try:
            answer = self._balancer.add(request, gauges)
        except _FAILURES as error:
            self._tell("add", error)
            raise self._refusal() from error
        rank = _integer(answer)
        if rank is not None and 0 <= rank < self._num_ranks:
            return rank
        # Numbers of thousands of digits can't be shown.
        said = rank if rank in range(-1000, 1_000_000) else f"a {type(answer).__name__}"
        there = f"there are the ranks 0 to {self._num_ranks - 1}"
        self._tell("add", ValueError(f"it returned {said}; {there}"))
        self.remove(request.request_id, finished=False)
        raise self._refusal()

    def progress(self, request_id: str, num_tokens: int) -> None:
        try:
            self._balancer.progress(request_id, num_tokens)
        except _FAILURES as error:
            self._tell("progress", error)

    def remove(self, request_id: str, *, finished: bool) -> None:
        try:
            self._balancer.remove(request_id, finished=finished)
        except _FAILURES as error:
            self._tell("remove", error)

    def _tell(self, method: str, error: BaseException) -> None:
        now_s = time.monotonic()
        if now_s - self._told_at_s.get(method, -QUIET_S) >= QUIET_S:
            self._told_at_s[method] = now_s
            log.error(
                "the balancer %r failed in %s: %r; this is told once a minute",
                self._name,
                method,
                error,
                exc_info=error,
            )

    def _refusal(self) -> RequestError:
        return RequestError(
            f"the balancer {self._name!r} failed, so this request has no DP rank; see the server's "
            "log",
            code="balancer_failed",
            status=500,
        )


def _integer(value: Any) -> int | None:
    try:
        return operator.index(value)  # numpy's integers as well
    except _FAILURES:
        return None


def make_balancer(table: PluginTable, parallel: ParallelConfig, num_ranks: int) -> Balancer:
    """The balancer that `parallel.dp_balancer` names, over DP ranks 0 .. num_ranks - 1. One rank
    needs none. Raises PluginError where it can't be built."""
    if num_ranks == 1:
        return SoloBalancer()
    name = parallel.dp_balancer
    choice = PluginChoice(name=name, options=parallel.dp_balancer_options)
    where = f"balancer plugin {name!r} (from {table.plugin_of(name)})"
    spec = BalancerSpec(num_ranks, BLOCK_TOKENS)
    try:
        made = table.create(choice, spec, options_key=OPTIONS_KEY)
    except ConfigError:
        raise
    except Exception as error:  # whatever a third party's factory raises
        raise PluginError(
            f"{where} can't be built: {type(error).__name__}: {error}\n"
            "start without it: set parallel.dp_balancer to another"
        ) from error
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if missing:
        raise PluginError(
            f"{where} made a {type(made).__name__} without {', '.join(missing)}; "
            "core.interfaces.balancer.Balancer says what a balancer has"
        )
    return GuardedBalancer(name, made, num_ranks)


def request_view(
    request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, priority: int = 0
) -> RequestView:
    """What a balancer is told of a request."""
    return RequestView(
        request_id,
        len(prompt_ids),
        sampling.max_tokens,
        sampling.ignore_eos and not sampling.stop_token_ids,
        priority,
        partial(prefix_hashes, prompt_ids),
    )


def prefix_hashes(prompt_ids: Sequence[int]) -> list[int]:
    """A hash of the first block, of the first two... Python keys it at random in each process."""
    packed = array("i", prompt_ids)
    block_bytes = BLOCK_TOKENS * packed.itemsize
    data = packed.tobytes()
    prefix, found = 0, []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        prefix = hash((prefix, data[start : start + block_bytes]))
        found.append(prefix)
    return found
