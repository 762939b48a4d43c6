"""Builds one rank of the engine from a resolved configuration. Knows nothing of processes.

Used by the worker process and by the offline engine alike. Every rank of a group calls it; the
collectives inside (agreeing on the pool size) happen on all of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from core.disk.progress import OnProgress
from core.engine.build.commit import commit_in_background
from core.engine.build.context import RankContext
from core.engine.build.loaded import Loaded, load
from core.engine.build.memory import (
    HeldMemory,
    PoolSize,
    page_bytes,
    plan_pool,
)
from core.engine.build.profile_run import ProfileRun, StartPhases, keep_kernels
from core.engine.build.runner import build_runner
from core.engine.build.timing import mixed_tokens_of, pace_of, warm_up_plans
from core.engine.run.executor import StepExecutor, select_executor
from core.engine.run.expert_balance import ExpertBalancer
from core.engine.run.loop import warm_up
from core.engine.run.runner import ModelRunner
from core.engine.schedule.scheduler import Scheduler
from core.engine.step.forward import OnCaptured
from core.settings.config import AppConfig

CAPTURE_TASK = "capture steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEngine:
    """One rank, ready to run steps. Only the leader of a DP rank uses `scheduler`."""

    scheduler: Scheduler
    executor: StepExecutor
    expert_balancer: ExpertBalancer
    pool: PoolSize
    pool_memory: torch.UntypedStorage | None  # that is not taken yet; None: on a GPU
    held: HeldMemory  # on a GPU, beside the pool
    cuda_graphs: str  # which steps are captured, or why none is
    mixed_tokens: int | None  # prompt tokens beside decodes, while few wait; None: on a CPU
    kv_cache_tokens: int
    max_model_len: int
    weight_bytes: int  # of this rank
    num_parameters: int  # of the whole model
    dtype: str

    def commit_pool(self) -> None:
        """Have the memory of a pool on a CPU taken in the background, for those that serve long."""
        if self.pool_memory is not None:
            commit_in_background(self.pool_memory)

    def describe(self) -> dict[str, Any]:
        """Plain values for the start-up summary and /server_info."""
        return {
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "num_parameters": self.num_parameters,
            "kv_pool_bytes": self.pool.total_bytes,
            "kv_cache_tokens": self.kv_cache_tokens,
            "max_model_len": self.max_model_len,
            "state_bytes": self.held.state,
            "activation_bytes": self.held.activations,
            "graph_bytes": self.held.graphs,
            "cuda_graphs": self.cuda_graphs,
            "mixed_prefill_tokens": self.mixed_tokens,
        }


def build_rank(config: AppConfig, context: RankContext) -> RankEngine:
    """Load the weights, try the largest steps out, give the pool what is left, warm up."""
    phases = StartPhases(context.on_phase)
    executor = select_executor(context.device)
    if context.device.type == "cuda":
        keep_kernels(config.engine.kernel_cache_dir)
    loaded = executor.run(lambda: load(config, context))
    phases.end("load weights")
    held = HeldMemory()
    if context.device.type == "cuda":
        held = _try_out(config, context, loaded, phases)
    pool = _agree_pool(config, context, loaded, held)
    kv_cache_tokens = (pool.num_pages - 1) * config.engine.settled_page_size
    max_model_len = min(loaded.max_model_len, kv_cache_tokens)
    runner = executor.run(lambda: build_runner(config, context, loaded, pool, max_model_len))
    phases.end("KV pool")
    steps = StepExecutor(executor, runner)
    warm_up(
        steps,
        warm_up_plans(min(max_model_len - 1, 16, config.engine.settled_page_size)),
        context.plan.axis_size("dp"),
    )
    if context.device.type == "cpu":
        steps.pace = pace_of(config, context, steps, max_model_len)
    phases.end("warm up")
    executor.run(lambda: runner.steps.capture(_on_captured(context.on_progress)))
    phases.end(CAPTURE_TASK)
    mixed_tokens = mixed_tokens_of(config, context, steps, max_model_len)
    return RankEngine(
        scheduler=Scheduler(
            config.engine,
            num_pages=pool.num_pages,
            max_model_len=max_model_len,
            eos_ids=context.files.eos_ids,
            dp_rank=context.plan.axis_index("dp", context.rank),
            pace=steps.pace,
            mixed_tokens=mixed_tokens,
        ),
        executor=steps,
        expert_balancer=runner.expert_balancer,
        pool=pool,
        pool_memory=runner.pool if context.device.type == "cpu" else None,
        held=replace(held, graphs=runner.steps.graph_bytes),
        cuda_graphs=runner.steps.describe(),
        mixed_tokens=mixed_tokens,
        kv_cache_tokens=kv_cache_tokens,
        max_model_len=max_model_len,
        weight_bytes=loaded.shapes.num_bytes,
        num_parameters=loaded.num_parameters,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def _on_captured(on_progress: OnProgress) -> OnCaptured:
    return lambda done, total: on_progress(CAPTURE_TASK, done, total, "steps")


def _try_out(
    config: AppConfig, context: RankContext, loaded: Loaded, phases: StartPhases
) -> HeldMemory:
    """Compile what steps need and measure the memory that the largest take, on a scratch pool."""
    device, max_model_len = context.device, loaded.max_model_len
    scratch = PoolSize(2, page_bytes(config.engine, loaded.model.kv, loaded.dtype))

    def scratch_runner(shortened: bool) -> ModelRunner:
        model = loaded.model.shortened() if shortened else loaded.model
        return build_runner(config, context, replace(loaded, model=model), scratch, max_model_len)

    return ProfileRun(
        engine=config.engine,
        max_model_len=max_model_len,
        device=device,
        num_dp=context.plan.axis_size("dp"),
        # What a kernel did not compute must not decide how long exchanged rows are.
        rehearses=context.plan.world_size == 1
        or all(dispatcher.capturable for dispatcher in loaded.dispatchers.values()),
        build_runner=scratch_runner,
        phases=phases,
        on_progress=context.on_progress,
    ).run()


def _agree_pool(
    config: AppConfig, context: RankContext, loaded: Loaded, held: HeldMemory
) -> PoolSize:
    """The smallest pool of any rank: page ids are the same in an attention group, and DP ranks take
    equally many requests."""
    pool = plan_pool(
        config.engine,
        loaded.model.kv,
        dtype=loaded.dtype,
        device=context.device,
        max_model_len=loaded.max_model_len,
        local_ranks=context.local_ranks,
        held=held,
    )
    mine = torch.tensor([pool.num_pages], dtype=torch.int64, device=context.device)
    everyone = context.comms.axes["world"].all_gather(mine, 0)
    return PoolSize(int(everyone.min()), pool.page_bytes)
