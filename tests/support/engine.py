"""Offline engines for tests: one process, any number of tp ranks (one thread each)."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.config import AppConfig, ModelConfig
from core.engine.build import RankContext, RankEngine, build_rank
from core.engine.loop import follow
from core.engine.offline import OfflineEngine
from core.interfaces.comm import SOLO, Comms
from core.interfaces.messages import SamplingParams, StepPlan
from core.loading.files import resolve_files
from core.plugin_manager import PluginManager
from core.resolve import resolve
from tests.support.ranks import thread_communicators

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
    """Plans handed to the follower ranks' threads."""

    def __init__(self, count: int) -> None:
        self.queues: list[queue.SimpleQueue[StepPlan | None]] = [
            queue.SimpleQueue() for _ in range(count)
        ]

    def send(self, plan: StepPlan | None) -> None:
        for waiting in self.queues:
            waiting.put(plan)


class _Ended(Exception):
    """Ends a follower's loop."""


class _QueueReceiver:
    def __init__(self, waiting: "queue.SimpleQueue[StepPlan | None]") -> None:
        self._waiting = waiting

    def receive(self) -> StepPlan:
        plan = self._waiting.get()
        if plan is None:
            raise _Ended
        return plan


@contextmanager
def offline_engine(config: AppConfig) -> Iterator[OfflineEngine]:
    """The engine of a configuration; `parallel.tp` ranks in threads of this process."""
    plugins = PluginManager.load([])
    files = resolve_files(config.model, lambda *_: None)
    resolved = resolve(config, plugins, files, "cpu")
    size = resolved.plan.tp_attn
    comms = [SOLO] if size == 1 else [Comms({"tp": comm}) for comm in thread_communicators(size)]
    failures: list[BaseException] = []
    plans = _QueuePlans(size - 1)

    def build(rank: int) -> RankEngine:
        context = RankContext(
            plugins=plugins,
            files=files,
            comms=comms[rank],
            device=CPU,
            local_ranks=size,
            on_phase=lambda *_: None,
            on_progress=lambda *_: None,
        )
        return build_rank(resolved.config, context)

    def run_follower(rank: int) -> None:
        try:
            engine = build(rank)
            follow(engine.launcher, _QueueReceiver(plans.queues[rank - 1]))
        except _Ended:
            pass
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run_follower, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    try:
        yield OfflineEngine(build(0), plans)
    finally:
        plans.send(None)
        for thread in threads:
            thread.join(60)
    assert not failures, failures
