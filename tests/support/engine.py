"""Offline engines for tests: one process, the ranks of any plan (one thread each)."""

import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.rank import RankEngine, build_rank
from core.engine.local.offline import OfflineEngine, OfflineLeader, SpreadEngine
from core.engine.run.loop import follow
from core.interfaces.messages import AgreedStep, EngineStats, SamplingParams
from core.plugin.plugin_manager import PluginManager
from core.resolve import resolve
from core.serve.balancer import make_balancer, request_view
from core.settings.config import AppConfig, ModelConfig
from core.sources.files import resolve_files
from core.testing.ranks import ThreadCommunicator, plan_comms
from tests.support.lockstep import thread_locksteps

CPU = torch.device("cpu")


def app_config(model: ModelConfig, **sections: dict[str, Any]) -> AppConfig:
    """A configuration on the CPU; `engine={"page_size": 1}` and the like override fields."""
    config = AppConfig(model=model)
    for section, values in ({"engine": {}} | sections).items():
        defaults = {"device": "cpu"} if section == "engine" else {}
        changed = replace(getattr(config, section), **(defaults | values))
        config = replace(config, **{section: changed})
    return config


def folder_model(folder: Path, dtype: str = "float32", **fields: Any) -> ModelConfig:
    """The checkpoint in a folder."""
    return ModelConfig(name=folder.name, path=str(folder), dtype=dtype, **fields)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    """Greedy decoding to the full length."""
    return SamplingParams(
        **{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | fields
    )


class _QueuePlans:
    """Steps handed to the follower ranks' threads."""

    def __init__(self, count: int) -> None:
        self.queues: list[queue.SimpleQueue[AgreedStep | None]] = [
            queue.SimpleQueue() for _ in range(count)
        ]

    def send(self, step: AgreedStep | None) -> None:
        for waiting in self.queues:
            waiting.put(step)


class _Ended(Exception):
    """Ends a follower's loop."""


class _QueueReceiver:
    def __init__(self, waiting: "queue.SimpleQueue[AgreedStep | None]") -> None:
        self._waiting = waiting

    def receive(self) -> AgreedStep:
        step = self._waiting.get()
        if step is None:
            raise _Ended
        return step


class _Ranks:
    """The ranks of a configuration, built in threads of this process."""

    def __init__(self, config: AppConfig, plugins: Mapping[str, object] | None = None) -> None:
        self.plugins = PluginManager.load([], objects=plugins)
        self._files = resolve_files(config.model, self.plugins, lambda *_: None)
        resolved = resolve(config, self.plugins, self._files, "cpu", native_dtypes())
        self.config, self.plan = resolved.config, resolved.plan
        self._comms = plan_comms(self.plan)
        self.groups = self.plan.groups("tp")  # by DP rank, the leader first
        self.plans = [_QueuePlans(len(group) - 1) for group in self.groups]
        self._pool = ThreadPoolExecutor(self.plan.world_size)
        self._following: list[Future[None]] = []

    def start(self) -> list[RankEngine]:
        """Build all ranks and let the followers follow; the leaders' engines by DP rank."""
        leaders = []
        for group, plans in zip(self.groups, self.plans, strict=True):
            leaders.append(self._pool.submit(self._build, group[0]))
            for rank, waiting in zip(group[1:], plans.queues, strict=True):
                self._following.append(self._pool.submit(self._follow, rank, waiting))
        return [leader.result() for leader in leaders]

    def stop(self) -> None:
        """End the followers; raises what one of them raised."""
        for plans in self.plans:
            plans.send(None)
        self._pool.shutdown()
        for follower in self._following:
            follower.result()

    def _follow(self, rank: int, waiting: "queue.SimpleQueue[AgreedStep | None]") -> None:
        with suppress(_Ended):
            follow(self._build(rank).executor, _QueueReceiver(waiting))

    def _build(self, rank: int) -> RankEngine:
        try:
            return build_rank(self.config, self._context(rank))
        except BaseException:
            for comm in self._comms[rank].axes.values():
                if isinstance(comm, ThreadCommunicator):
                    comm.abort()  # the others wait for this rank
            raise

    def _context(self, rank: int) -> RankContext:
        return RankContext(
            plugins=self.plugins,
            files=self._files,
            plan=self.plan,
            rank=rank,
            comms=self._comms[rank],
            device=CPU,
            local_ranks=self.plan.world_size,
            on_phase=lambda *_: None,
            on_progress=lambda *_: None,
        )


@contextmanager
def offline_engine(config: AppConfig) -> Iterator[OfflineEngine]:
    """The engine of a configuration with one DP rank."""
    with _running(config) as (ranks, leaders):
        assert len(leaders) == 1, "several DP ranks can't be turned by hand: use spread_engine"
        yield OfflineEngine(leaders[0], ranks.plans[0])


@contextmanager
def spread_engine(
    config: AppConfig, plugins: Mapping[str, object] | None = None
) -> Iterator[SpreadEngine]:
    """The engine of a configuration with any plan; requests are spread as it says. `plugins`: more
    than the built-in ones, by name."""
    with _running(config, plugins) as (ranks, leaders):
        locksteps = thread_locksteps(len(leaders))
        table = ranks.plugins.table("balancer")
        balancer = make_balancer(table, config.parallel, len(leaders))
        gauges = [EngineStats() for _ in leaders]
        yield SpreadEngine(
            [
                OfflineLeader(leader, plans, lockstep)
                for leader, plans, lockstep in zip(leaders, ranks.plans, locksteps, strict=True)
            ],
            lambda *request: balancer.add(request_view(*request), gauges),
        )


@contextmanager
def _running(
    config: AppConfig, plugins: Mapping[str, object] | None = None
) -> Iterator[tuple[_Ranks, list[RankEngine]]]:
    ranks = _Ranks(config, plugins)
    try:
        yield ranks, ranks.start()
    finally:
        ranks.stop()
