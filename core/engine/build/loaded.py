"""A rank's part of the model: does it fit, where are its experts, and the weights read.

Knows nothing of the KV pool or of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from core.checkpoints.open import open_weights
from core.devices.select import select_ops
from core.devices.weight_formats import select_format
from core.engine.build.context import RankContext, dtype_of
from core.engine.build.memory import check_weights_fit
from core.engine.build.model import (
    build_dispatchers,
    measure_rank,
    model_context,
    routes_at_random,
)
from core.engine.run.expert_balance import initial_placements
from core.interfaces.model import Model, ModelFamily, ModelSpec
from core.interfaces.moe_a2a import Dispatcher
from core.interfaces.ops import Ops
from core.parallel.experts import LayerPlacement
from core.parallel.plan import Plan
from core.resolve import find_family
from core.settings.config import AppConfig
from core.weights.reader import ShapeReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A rank's part of the model, and what was found out on the way."""

    model: Model
    dispatchers: Mapping[str, Dispatcher]  # by phase
    ops: Ops
    spec: ModelSpec
    dtype: torch.dtype
    shapes: ShapeReader  # of this rank
    num_parameters: int  # of the whole model
    max_model_len: int  # that the model and the configuration allow


def load(config: AppConfig, context: RankContext) -> Loaded:
    """Check that the weights fit, then read them."""
    family, spec = find_family(config, context.plugins, context.files)
    dtype, plan, device = dtype_of(config), context.plan, context.device
    placements = initial_placements(
        spec, plan, config.parallel.eplb, num_nodes=config.launch.nnodes
    )
    shapes, whole = _measure(config, context, family, spec, placements)
    widens = config.model.quantized_weights == "both"
    check_weights_fit(shapes.num_bytes, device, context.local_ranks, widened=widens)
    max_model_len = config.model.max_model_len or spec.max_position_embeddings
    # Compares the files with the model before any collective, and reads no weight yet.
    reader = open_weights(
        config.model,
        context.files,
        context.plugins.table("checkpoint_format"),
        dtype=dtype,
        device=device,
        on_progress=context.on_progress,
        spec=spec,
        rank_shapes=shapes,
        model_shapes=whole,
    )
    ops = select_ops(device)
    weight_format = select_format(
        device, spec.quantization, dtype, keep_groups=_keeps_groups(config), widen_groups=widens
    )
    dispatchers = _dispatchers(config, context, spec, max_model_len)
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
            weight_format=weight_format,
            placements=placements,
            dispatchers=dispatchers,
            uniform_routing=routes_at_random(config, context.rank),
        ),
    )
    reader.finish()
    return Loaded(
        model=model,
        dispatchers=dispatchers,
        ops=ops,
        spec=spec,
        dtype=dtype,
        shapes=shapes,
        num_parameters=whole.num_logical_parameters,
        max_model_len=max_model_len,
    )


def _measure(
    config: AppConfig,
    context: RankContext,
    family: ModelFamily,
    spec: ModelSpec,
    placements: Mapping[int, LayerPlacement],
) -> tuple[ShapeReader, ShapeReader]:
    """The weights of this rank, and those of the model: one rank's that is alone, each expert
    once."""
    dtype, plan, device = dtype_of(config), context.plan, context.device
    shapes = measure_rank(
        family,
        spec,
        plan,
        context.rank,
        dtype=dtype,
        device=device,
        placements=placements,
        group_bits=context.files.group_bits if _keeps_groups(config) else {},
        widen_groups=config.model.quantized_weights == "both",
    )
    if plan.world_size > 1 or plan.redundant_experts > 0:
        return shapes, measure_rank(family, spec, Plan(), 0, dtype=dtype, device=device)
    return shapes, shapes


def _keeps_groups(config: AppConfig) -> bool:
    return config.model.quantized_weights in ("keep", "both")


def _dispatchers(
    config: AppConfig, context: RankContext, spec: ModelSpec, max_model_len: int
) -> Mapping[str, Dispatcher]:
    return build_dispatchers(
        config,
        context.plugins,
        spec,
        context.plan,
        context.comms,
        dtype=dtype_of(config),
        device=context.device,
        max_model_len=max_model_len,
    )
