"""Builds one rank of the engine from a resolved configuration. Knows nothing of processes.

Used by the worker process and by the offline engine alike. Every rank of a group calls it; the
collectives inside (agreeing on the pool size) happen on all of them.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from core.checkpoints.open import open_weights
from core.devices.select import select_ops
from core.devices.weight_formats import select_format
from core.disk.progress import OnProgress
from core.engine.build.commit import commit_in_background
from core.engine.build.memory import (
    HeldMemory,
    PoolSize,
    allocate_latent_pool,
    allocate_pool,
    check_weights_fit,
    page_bytes,
    plan_pool,
)
from core.engine.build.model import (
    build_dispatchers,
    measure_rank,
    model_context,
    routes_at_random,
    stream_of,
)
from core.engine.build.trial import OnPhase, Phases, Trial, keep_kernels
from core.engine.run.expert_balance import Balancer, initial_placements, make_balancer
from core.engine.run.launch import StepLauncher, select_launcher
from core.engine.run.loop import warm_up
from core.engine.run.runner import ModelRunner
from core.engine.sample.choosing import make_chooser
from core.engine.sample.sampler import Sampler
from core.engine.schedule.mixed_steps import mixed_tokens
from core.engine.schedule.pace import Pace, Timed, measure_pace
from core.engine.schedule.scheduler import Scheduler
from core.engine.step.attention import PagedAttention
from core.engine.step.batch import SlotState
from core.engine.step.decode_graphs import make_steps
from core.engine.step.forward import AttentionOfRank, OnCaptured, RankParts
from core.engine.step.latent_attention import LatentPagedAttention
from core.engine.step.trial_steps import most_prompt_tokens
from core.interfaces.attention import AttentionSpec
from core.interfaces.comm import Comms
from core.interfaces.control import ModelFiles
from core.interfaces.latent_attention import LatentAttentionSpec
from core.interfaces.messages import SamplingParams, SlotInit, StepPlan
from core.interfaces.model import LatentKVShape, Model, ModelSpec
from core.interfaces.moe_a2a import Dispatcher
from core.interfaces.ops import Ops
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.resolve import attention_family, find_family
from core.settings.config import AppConfig
from core.weights.reader import ShapeReader

CAPTURE_TASK = "capture steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEngine:
    """One rank, ready to run steps. Only the leader of a DP rank uses `scheduler`."""

    scheduler: Scheduler
    launcher: StepLauncher
    balancer: Balancer
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What a rank is built from, beside the configuration."""

    plugins: PluginManager
    files: ModelFiles
    plan: Plan
    rank: int
    comms: Comms
    device: torch.device
    local_ranks: int  # ranks that share this host's memory
    on_phase: OnPhase
    on_progress: OnProgress


def build_rank(config: AppConfig, context: RankContext) -> RankEngine:
    """Load the weights, try the largest steps out, give the pool what is left, warm up."""
    phases = Phases(context.on_phase)
    launcher = select_launcher(context.device)
    if context.device.type == "cuda":
        keep_kernels(config.engine.kernel_cache_dir)
    loaded = launcher.run(lambda: _load(config, context))
    phases.end("load weights")
    held = HeldMemory()
    if context.device.type == "cuda":
        held = _try_out(config, context, loaded, phases)
    pool = _agree_pool(config, context, loaded, held)
    kv_cache_tokens = (pool.num_pages - 1) * config.engine.settled_page_size
    max_model_len = min(loaded.max_model_len, kv_cache_tokens)
    runner = launcher.run(lambda: _build_runner(config, context, loaded, pool, max_model_len))
    phases.end("KV pool")
    steps = StepLauncher(launcher, runner)
    warm_up(
        steps,
        _warm_up_plans(min(max_model_len - 1, 16, config.engine.settled_page_size)),
        context.plan.axis_size("dp"),
    )
    if context.device.type == "cpu":
        steps.pace = _measure_pace(config, context, steps, max_model_len)
    phases.end("warm up")
    launcher.run(lambda: runner.steps.capture(_on_captured(context.on_progress)))
    phases.end(CAPTURE_TASK)
    mixed_tokens = _mixed_tokens(config, context, steps, max_model_len)
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
        launcher=steps,
        balancer=runner.balancer,
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
    config: AppConfig, context: RankContext, loaded: "_Loaded", phases: Phases
) -> HeldMemory:
    """Compile what steps need and measure the memory that the largest take, on a scratch pool."""
    device, max_model_len = context.device, loaded.max_model_len
    scratch = PoolSize(2, page_bytes(config.engine, loaded.model.kv, loaded.dtype))

    def build_runner(shortened: bool) -> ModelRunner:
        model = loaded.model.shortened() if shortened else loaded.model
        return _build_runner(config, context, replace(loaded, model=model), scratch, max_model_len)

    return Trial(
        engine=config.engine,
        max_model_len=max_model_len,
        device=device,
        num_dp=context.plan.axis_size("dp"),
        # What a kernel did not compute must not decide how long exchanged rows are.
        rehearses=context.plan.world_size == 1
        or all(dispatcher.capturable for dispatcher in loaded.dispatchers.values()),
        build_runner=build_runner,
        phases=phases,
        on_progress=context.on_progress,
    ).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A rank's part of the model, and what was found out on the way."""

    model: Model
    dispatchers: Mapping[str, Dispatcher]  # by phase
    ops: Ops
    spec: ModelSpec
    dtype: torch.dtype
    shapes: ShapeReader  # of this rank
    num_parameters: int  # of the whole model
    max_model_len: int  # that the model and the configuration allow


def _load(config: AppConfig, context: RankContext) -> _Loaded:
    """Check that the weights fit, then read them."""
    family, spec = find_family(config, context.plugins, context.files)
    dtype = dtype_of(config)
    ops = select_ops(context.device)
    plan, device = context.plan, context.device
    placements = initial_placements(
        spec, plan, config.parallel.eplb, num_nodes=config.launch.nnodes
    )
    keeps = config.model.quantized_weights in ("keep", "both")
    widens = config.model.quantized_weights == "both"
    group_bits = context.files.group_bits if keeps else {}
    shapes = measure_rank(
        family,
        spec,
        plan,
        context.rank,
        dtype=dtype,
        device=device,
        placements=placements,
        group_bits=group_bits,
        widen_groups=widens,
    )
    check_weights_fit(shapes.num_bytes, device, context.local_ranks, widened=widens)
    whole = shapes  # of the model: one rank's that is alone, each expert once
    if plan.world_size > 1 or plan.redundant_experts > 0:
        whole = measure_rank(family, spec, Plan(), 0, dtype=dtype, device=device)
    max_model_len = config.model.max_model_len or spec.max_position_embeddings
    # Compares the files with the model before any collective, and reads no weight yet.
    reader = open_weights(
        config.model,
        context.files,
        dtype=dtype,
        device=device,
        on_progress=context.on_progress,
        spec=spec,
        rank_shapes=shapes,
        model_shapes=whole,
    )
    dispatchers = build_dispatchers(
        config,
        context.plugins,
        spec,
        plan,
        context.comms,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
    )
    model = family.build(
        spec,
        model_context(
            spec=spec,
            plan=plan,
            weights=reader,
            comms=context.comms,
            ops=ops,
            dtype=dtype,
            device=device,
            form=select_format(
                device, spec.quantization, dtype, keep_groups=keeps, widen_groups=widens
            ),
            placements=placements,
            dispatchers=dispatchers,
            uniform_routing=routes_at_random(config, context.rank),
        ),
    )
    reader.finish()
    return _Loaded(
        model=model,
        dispatchers=dispatchers,
        ops=ops,
        spec=spec,
        dtype=dtype,
        shapes=shapes,
        num_parameters=whole.num_logical_parameters,
        max_model_len=max_model_len,
    )


def _build_runner(
    config: AppConfig, context: RankContext, loaded: _Loaded, pool: PoolSize, max_model_len: int
) -> ModelRunner:
    """Allocate the pool and the slots, build the attention backends and the sampler."""
    engine, device = config.engine, context.device
    stream = stream_of(loaded.spec, context.plan)
    state = SlotState(
        num_slots=engine.running_limit,
        max_tokens=max_model_len,
        page_size=engine.settled_page_size,
        device=device,
    )
    parts = RankParts(
        model=loaded.model,
        attention=_build_attention(config, context, loaded, pool, max_model_len),
        state=state,
        plan=context.plan,
        rank=context.rank,
        stream=stream,
    )
    sampler = Sampler(
        max_slots=engine.running_limit,
        vocab_size=loaded.spec.vocab_size,
        device=device,
        eos_ids=context.files.eos_ids,
    )
    tp = context.comms.axes["tp"]
    return ModelRunner(
        progress=parts.attention.progress,
        pool=parts.attention.pool,
        steps=make_steps(
            engine,
            parts,
            max_model_len=max_model_len,
            comms=context.comms,
            dispatchers=loaded.dispatchers,
        ),
        sampler=sampler,
        chooser=make_chooser(sampler, state, tp, loaded.model.head, shares_head=parts.shares_head),
        state=state,
        comm=tp,
        balancer=make_balancer(
            loaded.model.expert_layers,
            context.comms.axes["world"],
            config.parallel.eplb,
            loaded.spec,
            context.plan,
            num_nodes=config.launch.nnodes,
            rows_are_cut=stream is Layout.ROWS,
        ),
    )


def _build_attention(
    config: AppConfig, context: RankContext, loaded: _Loaded, pool: PoolSize, max_model_len: int
) -> AttentionOfRank:
    """The cache and the backend of each phase, of the kind that the model needs."""
    model, kv = loaded.model, loaded.model.kv
    common: dict[str, Any] = {
        "page_size": config.engine.settled_page_size,
        "dtype": loaded.dtype,
        "device": context.device,
    }

    def backends(spec: AttentionSpec | LatentAttentionSpec) -> Iterator[Any]:
        table = context.plugins.table(attention_family(loaded.spec))
        yield table.create(config.attention.prefill, spec, key="attention.prefill")
        yield table.create(config.attention.decode, spec, key="attention.decode")

    if isinstance(kv, LatentKVShape):
        prefill, decode = backends(
            LatentAttentionSpec(
                num_heads=model.num_heads,
                nope_dim=kv.nope_dim,
                rope_dim=kv.rope_dim,
                value_dim=kv.value_dim,
                latent_dim=kv.latent_dim,
                scale=kv.scale,
                max_context_tokens=max_model_len,
                **common,
            )
        )
        caches = allocate_latent_pool(pool, kv, **common)
        return LatentPagedAttention(
            loaded.ops, caches, kv.value_dim, kv.latent_dim, prefill, decode
        )
    prefill, decode = backends(
        AttentionSpec(
            num_heads=model.num_heads,
            num_kv_heads=kv.num_kv_heads,
            head_dim=kv.head_dim,
            scale=kv.scale,
            max_context_tokens=max_model_len,
            **common,
        )
    )
    return PagedAttention(loaded.ops, allocate_pool(pool, kv, **common), prefill, decode)


def dtype_of(config: AppConfig) -> torch.dtype:
    """What weights, activations and cache are computed in; `config` is settled."""
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _agree_pool(
    config: AppConfig, context: RankContext, loaded: _Loaded, held: HeldMemory
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


def _measure_pace(
    config: AppConfig, context: RankContext, steps: StepLauncher, max_model_len: int
) -> Pace:
    """What steps cost, agreed on by all ranks: the slowest one's time is everybody's."""
    return measure_pace(
        _timed(context, steps),
        step_tokens=most_prompt_tokens(config.engine, max_model_len),
        context_tokens=max_model_len - 1,
    )


def _mixed_tokens(
    config: AppConfig, context: RankContext, steps: StepLauncher, max_model_len: int
) -> int | None:
    """Most prompt tokens beside decodes while few prompts wait; None: a CPU's steps are cut to a
    time instead."""
    if context.device.type == "cpu":
        return None
    if config.engine.mixed_prefill_tokens is not None:
        return config.engine.mixed_prefill_tokens
    most = most_prompt_tokens(config.engine, max_model_len)
    return mixed_tokens(_timed(context, steps), min(most, max_model_len - 1), most)


def _timed(context: RankContext, steps: StepLauncher) -> Timed:
    """Runs a step of made-up requests; the seconds that the slowest rank took."""
    world, num_dp = context.comms.axes["world"], context.plan.axis_size("dp")

    def timed(plan: StepPlan) -> float:
        begin = time.perf_counter()
        warm_up(steps, [plan], num_dp)
        seconds = time.perf_counter() - begin
        mine = torch.tensor([seconds], dtype=torch.float64, device=context.device)
        return float(world.all_gather(mine, 0).max())

    return timed


def _warm_up_plans(num_tokens: int) -> list[StepPlan]:
    """A prefill and a decode step of one made-up request, on the scratch page."""
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    init = SlotInit(0, [0] * num_tokens, num_tokens, greedy, 0)
    prefill = StepPlan(0, [init], 0, [0], [0], [num_tokens], [True], [0], [0], [0])
    decode = StepPlan(0, [], 1, [0], [num_tokens - 1], [1], [True], [], [], [])
    return [prefill, decode]
