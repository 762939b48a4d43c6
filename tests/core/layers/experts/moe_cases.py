"""Mixture-of-experts blocks of transformers with random weights, and ours over ranks in threads.

Shape legend: T rows, E hidden size, X logical experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from core.devices.select import select_row_ops
from core.interfaces.comm import Comms
from core.interfaces.model import BuildContext, ExpertContext, ModelStep
from core.interfaces.moe_a2a import A2ASpec, Dispatcher
from core.interfaces.ops import Ops
from core.interfaces.routing import Routing
from core.interfaces.weights import BlockFp8, PlainFormat, Shard, WeightFormat
from core.layers.experts.moe import MoELayer
from core.layers.experts.moe_spec import MIXTRAL_NAMES, MoELayerSpec
from core.ops.block_fp8 import BLOCK, quantize
from core.ops.torch_ops import TorchOps
from core.parallel.experts import LayerPlacement
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows
from core.plugin.hookspecs import NoOptions
from plugins.moe_a2a._options import AllGatherOptions, NcclOptions
from plugins.moe_a2a.allgather import AllGatherDispatcher
from plugins.moe_a2a.local import LocalDispatcher
from plugins.moe_a2a.nccl import NcclDispatcher

CPU = torch.device("cpu")
PLAIN = PlainFormat()
HIDDEN, SIZE, NUM_EXPERTS, TOP_K = 32, 24, 8, 3
LAYER = 2
SOFTMAX = Routing(top_k=TOP_K, scoring="softmax", normalise=True)
GROUPED = {"num_groups": 4, "num_chosen_groups": 2}

DISPATCHERS: dict[str, Callable[[A2ASpec], Dispatcher]] = {
    "local": lambda spec: LocalDispatcher(NoOptions(), spec),
    "allgather": lambda spec: AllGatherDispatcher(AllGatherOptions(), spec),
    "contiguous": lambda spec: AllGatherDispatcher(AllGatherOptions(layout="contiguous"), spec),
    "batched": lambda spec: AllGatherDispatcher(AllGatherOptions(layout="batched"), spec),
    "nccl": lambda spec: NcclDispatcher(NcclOptions(), spec),
}


class StateReader:
    """A state dict as core.interfaces.weights.WeightReader."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self._state, self._prefix = state, prefix

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        whole = self._state[self._prefix + name]
        assert tuple(whole.shape) == shape, name
        part = whole if shard is None else _cut(whole, shard, *shard.bounds(shape[shard.dim]))
        return part.to(dtype or torch.float32, copy=True)

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        whole = quantize(self._state[self._prefix + name])
        assert tuple(whole.values_OI.shape) == shape, name
        if shard is None:
            return whole
        start, stop = shard.bounds(shape[shard.dim])
        assert start % BLOCK == 0
        values = _cut(whole.values_OI, shard, start, stop)
        return BlockFp8(
            values.clone(), _cut(whole.scales, shard, start // BLOCK, -(-stop // BLOCK)).clone()
        )

    def has(self, name: str) -> bool:
        return self._prefix + name in self._state

    def scope(self, prefix: str) -> "StateReader":
        return StateReader(self._state, f"{self._prefix}{prefix}.")


def _cut(whole: Tensor, shard: Shard, start: int, stop: int) -> Tensor:
    return whole.narrow(shard.dim, start, stop - start)


@dataclass(frozen=True)
class Family:
    """A block of transformers and what ours is to be built with."""

    make: Callable[[], nn.Module]
    spec: MoELayerSpec


def _spec(routing: Routing, **fields: Any) -> MoELayerSpec:
    return MoELayerSpec(
        hidden_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        expert_intermediate_size=SIZE,
        routing=routing,
        **fields,
    )


def _deepseek(make_config: type, **changes: Any) -> Any:
    return make_config(
        **{
            "hidden_size": HIDDEN,
            "moe_intermediate_size": SIZE,
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            **changes,
        }
    )


FAMILIES = {
    "deepseek_v3": Family(
        lambda: DeepseekV3MoE(_deepseek(DeepseekV3Config, routed_scaling_factor=2.5)),
        _spec(
            Routing(
                top_k=TOP_K, scoring="sigmoid", normalise=True, scale=2.5, group_top=2, **GROUPED
            ),
            has_bias=True,
            shared_intermediate_size=2 * SIZE,
        ),
    ),
    "deepseek_v2": Family(
        lambda: DeepseekV2Moe(
            _deepseek(
                DeepseekV2Config, topk_method="group_limited_greedy", routed_scaling_factor=16.0
            )
        ),
        _spec(
            Routing(top_k=TOP_K, scoring="softmax", normalise=False, scale=16.0, **GROUPED),
            shared_intermediate_size=2 * SIZE,
        ),
    ),
    "deepseek_v2_lite": Family(
        lambda: DeepseekV2Moe(
            _deepseek(DeepseekV2Config, topk_method="greedy", routed_scaling_factor=1.0)
        ),
        _spec(
            Routing(top_k=TOP_K, scoring="softmax", normalise=False),
            shared_intermediate_size=2 * SIZE,
        ),
    ),
    "qwen3_moe": Family(
        lambda: Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                hidden_size=HIDDEN,
                moe_intermediate_size=SIZE,
                num_experts=NUM_EXPERTS,
                num_experts_per_tok=TOP_K,
                norm_topk_prob=True,
            )
        ),
        _spec(SOFTMAX),
    ),
    "mixtral": Family(
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=HIDDEN,
                intermediate_size=SIZE,
                num_local_experts=NUM_EXPERTS,
                num_experts_per_tok=TOP_K,
            )
        ),
        _spec(SOFTMAX, names=MIXTRAL_NAMES, block="block_sparse_moe"),
    ),
}


@torch.no_grad()
def random_block(family: Family, seed: int = 3) -> nn.Module:
    """The block in float32, its biases included."""
    torch.manual_seed(seed)
    block = family.make().float().eval()
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.normal_(std=0.3)
    return block


def checkpoint(block: nn.Module, spec: MoELayerSpec) -> dict[str, Tensor]:
    """Its weights as a checkpoint names them: one matrix for each expert."""
    state = {n: v for n, v in block.state_dict().items() if not n.startswith("experts.")}
    names, experts = spec.names, block.experts
    for expert, (gate_up, down) in enumerate(
        zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ):
        gate, up = gate_up.detach().chunk(2)
        for name, matrix in ((names.gate, gate), (names.up, up), (names.down, down.detach())):
            state[f"experts.{expert}.{name}.weight"] = matrix
    return state


@dataclass(frozen=True)
class Setup:
    """How our layer is spread and computed."""

    plan: Plan
    placement: LayerPlacement
    dispatcher: str = "local"
    ops: Callable[[], Ops] = TorchOps
    form: WeightFormat = PLAIN
    device: torch.device = CPU

    @property
    def stream(self) -> Layout:
        cut = self.plan.cuts_rows(has_experts=True)
        return Layout.ROWS if cut else Layout.REPLICATED

    def layer(
        self,
        spec: MoELayerSpec,
        weights: Mapping[str, Tensor],
        comms: Comms,
        dispatchers: Mapping[str, Dispatcher] | None = None,
    ) -> MoELayer:
        """This rank's layer; its decode and prefill dispatchers are alike."""
        a2a = A2ASpec(
            comm=comms.axes["ep"],
            num_experts=self.placement.num_physical,
            top_k=spec.top_k,
            hidden_size=spec.hidden_size,
            dtype=torch.float32,
            device=self.device,
            ops=select_row_ops(self.device),
            max_rows=64,
            phase="prefill",
        )
        dispatchers = dispatchers or {
            phase: DISPATCHERS[self.dispatcher](replace(a2a, phase=phase))
            for phase in ("prefill", "decode")
        }
        reader = StateReader({name: value.to(self.device) for name, value in weights.items()})
        context = BuildContext(
            weights=reader,
            comms=comms,
            ops=self.ops(),
            dtype=torch.float32,
            device=self.device,
            format=self.form,
            stream=self.stream,
            experts=ExpertContext(placements={LAYER: self.placement}, dispatchers=dispatchers),
        )
        return MoELayer(context, reader, spec, LAYER)

    def rows(self, comms: Comms, by_dp: Sequence[int]) -> StepRows:
        return StepRows(self.plan, comms.axes["world"].rank, tuple(by_dp))

    def part_of(self, x_TE: Tensor, rows: StepRows) -> Tensor:
        """What a rank has of all DP ranks' rows, which lie back to back in `x_TE`; padding is
        anything."""
        dp = self.plan.axis_index("dp", rows.rank)
        mine = x_TE[sum(rows.by_dp[:dp]) :][: rows.num_real]
        padding = torch.full((rows.num_padded - rows.num_real, x_TE.shape[1]), 7.0)
        padded = torch.cat((mine, padding))
        if self.stream is Layout.REPLICATED:
            return padded
        return padded[self.plan.axis_index("tp", rows.rank) * rows.part :][: rows.part]

    def real(self, x_TE: Tensor, rows: StepRows) -> Tensor:
        """A rank's rows without padding."""
        num = rows.num_real if self.stream is Layout.REPLICATED else rows.real_part
        return x_TE[:num]


def step_of(rows: StepRows, phase: str = "prefill", device: torch.device = CPU) -> ModelStep:
    """A step for a layer without attention."""
    nothing: Any = None
    return ModelStep(
        nothing,
        nothing,
        rows,
        phase,
        torch.tensor([rows.num_real], device=device, dtype=torch.int32),
    )
