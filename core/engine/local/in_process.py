"""One rank of a configuration in this process: the whole engine where the plan has one rank, and
otherwise one rank's share of it with stand-ins for its peers (plugins of `comm` that allow it).

For benchmarks and scripts: takes the path that a worker process takes, without processes. What a
rank computes with stand-ins has the right shapes and costs, and means nothing.
"""

import os
from dataclasses import dataclass

import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.device import open_device
from core.engine.build.profile_run import OnPhase
from core.engine.build.rank import RankEngine, build_rank
from core.engine.build.ranks import stand_in_for_peers
from core.engine.local.offline import OfflineEngine
from core.engine.run.lockstep import Agreement, rank_facts, settle
from core.interfaces.comm import SOLO, Comms
from core.interfaces.messages import ScheduledStep
from core.plugin.plugin_manager import PluginManager
from core.resolve import Resolved, resolve
from core.settings.config import AppConfig
from core.sources.files import resolve_files


@dataclass(frozen=True, slots=True)
class LoneRank:
    """A rank that was built, and what was settled on the way."""

    resolved: Resolved
    engine: RankEngine
    device: torch.device


def build_in_process(
    config: AppConfig, rank: int = 0, on_phase: OnPhase = lambda name, seconds: None
) -> LoneRank:
    """Build one rank of a configuration. Raises ConfigError where the plan has several and the
    chosen comm plugins need them."""
    name = config.engine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = open_device("cuda:0" if name == "cuda" else name, os.cpu_count() or 1)
    plugins = PluginManager.load(config.plugins.blocklist)
    plugins.check_choices(config)
    files = resolve_files(
        config.model,
        plugins,
        lambda task, done, total, unit: None,
    )
    resolved = resolve(config, plugins, files, name, native_dtypes())
    built = build_rank(
        resolved.config,
        RankContext(
            plugins=plugins,
            files=files,
            plan=resolved.plan,
            rank=rank,
            comms=_comms(resolved, rank, plugins),
            device=device,
            local_ranks=1,
            on_phase=on_phase,
            on_progress=lambda task, done, total, unit: None,
        ),
    )
    return LoneRank(resolved, built, device)


def offline_in_process(lone: LoneRank) -> OfflineEngine:
    """An engine that generates; other DP ranks are taken to hold what this one does."""
    return OfflineEngine(lone.engine, lockstep=MirrorLockstep(lone.resolved.plan.dp))


class MirrorLockstep:
    """Agrees with DP ranks that all do the same as this one."""

    def __init__(self, num_dp: int) -> None:
        self._num_dp = num_dp
        self._round = 0

    def agree(self, scheduled: ScheduledStep | None, *, busy: bool) -> Agreement:
        self._round += 1
        return settle([rank_facts(self._round, scheduled, busy=busy)] * self._num_dp)


def _comms(resolved: Resolved, rank: int, plugins: PluginManager) -> Comms:
    if resolved.plan.world_size == 1:
        return SOLO
    return stand_in_for_peers(resolved.config, resolved.plan, rank, plugins)
