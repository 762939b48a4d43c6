"""Builds one rank's part of a model for a plan: what it is built from, and what it would hold.

Knows nothing of requests, pools or processes. Used with real communicators to load, and with mere
places (`core.interfaces.comm.places`) to measure any rank of any plan without weights.
"""

import logging
from collections.abc import Mapping

import torch

from core.devices.select import select_row_ops
from core.devices.weight_formats import select_format
from core.engine.run.expert_balance import initial_placements
from core.interfaces.comm import Comms, places
from core.interfaces.model import BuildContext, ExpertContext, Model, ModelFamily, ModelSpec
from core.interfaces.moe_a2a import A2ASpec, Dispatcher
from core.interfaces.ops import Ops
from core.interfaces.weights import WeightFormat, WeightReader
from core.ops.torch_ops import TorchOps
from core.parallel.experts import LayerPlacement
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.settings.config import AppConfig, EngineConfig, ExpertBalanceConfig
from core.weights.reader import ShapeReader

log = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
META = torch.device("meta")


def stream_of(spec: ModelSpec, plan: Plan) -> Layout:
    """How rows lie over tp between blocks."""
    cut = plan.cuts_rows(has_experts=spec.moe is not None)
    return Layout.ROWS if cut else Layout.REPLICATED


def head_axis_of(plan: Plan) -> str:
    """The ranks that share the output head."""
    return "tp" if plan.dp_lm_head else "world"


def model_context(
    *,
    spec: ModelSpec,
    plan: Plan,
    weights: WeightReader,
    comms: Comms,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    weight_format: WeightFormat,
    placements: Mapping[int, LayerPlacement],
    dispatchers: Mapping[str, Dispatcher],
    uniform_routing: bool = False,
) -> BuildContext:
    """What the model of a rank is built from."""
    return BuildContext(
        weights=weights,
        comms=comms,
        ops=ops,
        dtype=dtype,
        device=device,
        format=weight_format,
        stream=stream_of(spec, plan),
        head_axis=head_axis_of(plan),
        experts=(
            ExpertContext(
                placements=placements, dispatchers=dispatchers, uniform_routing=uniform_routing
            )
            if spec.moe
            else None
        ),
    )


def measure_model(
    family: ModelFamily,
    spec: ModelSpec,
    plan: Plan,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    placements: Mapping[int, LayerPlacement] | None = None,
    group_bits: Mapping[str, int] | None = None,
    widen_groups: bool = False,
) -> tuple[Model, ShapeReader]:
    """A rank's part of a model without weights (it can't compute), and what it would hold on a
    device of that type. Experts are in order unless `placements` says otherwise. `group_bits`: of
    matrices that stay in groups, by name, with `widen_groups` in 16 bits besides; None: none do."""
    shapes = ShapeReader(dtype, group_bits=group_bits, widened=widen_groups)
    model = family.build(
        spec,
        model_context(
            spec=spec,
            plan=plan,
            weights=shapes,
            comms=places(plan, rank),
            ops=TorchOps(),
            dtype=dtype,
            device=META,
            weight_format=select_format(
                device,
                spec.quantization,
                dtype,
                keep_groups=bool(group_bits),
                widen_groups=widen_groups,
            ),
            placements=(
                initial_placements(spec, plan, ExpertBalanceConfig())
                if placements is None
                else placements
            ),
            dispatchers={},
        ),
    )
    return model, shapes


def measure_rank(
    family: ModelFamily,
    spec: ModelSpec,
    plan: Plan,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    placements: Mapping[int, LayerPlacement] | None = None,
    group_bits: Mapping[str, int] | None = None,
    widen_groups: bool = False,
) -> ShapeReader:
    """What a rank of a plan would hold on a device of that type, without reading any of it."""
    return measure_model(
        family,
        spec,
        plan,
        rank,
        dtype=dtype,
        device=device,
        placements=placements,
        group_bits=group_bits,
        widen_groups=widen_groups,
    )[1]


def routes_at_random(config: AppConfig, rank: int) -> bool:
    """Whether experts are drawn at random; the first rank says what that means."""
    at_random = config.model.expert_routing == "uniform_random"
    if at_random and rank == 0:
        log.warning(
            "model.expert_routing=uniform_random: experts are drawn at random, for benchmarks; "
            "answers mean nothing. Leave it out to serve"
        )
    return at_random


def build_dispatchers(
    config: AppConfig,
    plugins: PluginManager,
    spec: ModelSpec,
    plan: Plan,
    comms: Comms,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> dict[str, Dispatcher]:
    """The chosen moe_a2a plugin of each phase; made before weights are read, because their
    buffers may not fit. Empty for a model without experts."""
    if spec.moe is None:
        return {}
    rows = _most_rows(config.engine, plan, max_model_len)
    fp8 = spec.quantization is not None and device.type == "cuda"
    return {
        phase: plugins.table("moe_a2a").create(
            getattr(config.moe_a2a, phase),
            A2ASpec(
                comm=comms.axes["ep"],
                num_experts=spec.moe.num_experts + plan.redundant_experts,
                top_k=spec.moe.top_k,
                hidden_size=spec.hidden_size,
                dtype=dtype,
                device=device,
                ops=select_row_ops(device),
                max_rows=rows[phase],
                phase=phase,
                fp8=fp8,
            ),
            key=f"moe_a2a.{phase}",
        )
        for phase in PHASES
    }


def _most_rows(engine: EngineConfig, plan: Plan, max_model_len: int) -> dict[str, int]:
    """Rows one rank may enter a dispatch with: its part of its DP rank's tokens, and those of the
    ranks that it shares experts with."""
    decode = engine.running_limit
    prompts = engine.max_prefill_tokens
    if engine.chunked_prefill_size == -1:
        prompts = max(prompts, max_model_len)  # one prompt may exceed the budget of a step
    tokens = {"prefill": prompts + decode, "decode": decode}
    return {phase: -(-number // plan.tp_attn) * plan.tp_expert for phase, number in tokens.items()}
