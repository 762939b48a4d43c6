"""Latent attention against transformers' DeepSeek modules, in float32: prompts in chunks, then
single tokens over the cache; alone and with heads over ranks, rows replicated or shared out."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from core.devices.cpu.cpu_ops import CpuOps
from core.engine.step.batch import Batch
from core.engine.step.latent_attention import LatentPagedAttention
from core.interfaces.attention import SequenceBatch
from core.interfaces.comm import SOLO, Comms
from core.interfaces.latent_attention import LatentAttentionSpec
from core.interfaces.model import BuildContext
from core.interfaces.weights import BlockFp8, PlainFormat, Shard
from core.layers.attention.mla import LatentAttention, LatentExpansion
from core.layers.attention.mla_spec import LatentAttentionSizes, latent_scale
from core.layers.attention.rope import rope_table
from core.layers.attention.rope_spec import parse_rope
from core.ops.torch_ops import TorchOps
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows
from core.plugin.hookspecs import NoOptions
from core.testing.ranks import plan_comms, run_ranks
from plugins.attention._cpu import latent as cpu_latent
from plugins.attention._torch_ref import latent as torch_ref_latent

CPU = torch.device("cpu")
NUM_TOKENS, NUM_POSITIONS, PAGE_SIZE = 23, 64, 4
STEPS = [(0, 10), (10, 7), *((start, 1) for start in range(17, NUM_TOKENS))]  # start, length
COMMON = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, slots=True)
class Reference:
    """One module of transformers: its weights, inputs and outputs."""

    config: DeepseekV2Config | DeepseekV3Config
    weights: dict[str, Tensor]
    x_TE: Tensor
    expected_TE: Tensor


class StateReader:
    """A state dict as core.interfaces.weights.WeightReader; remembers what was taken."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.taken = state, set[str]()

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        assert tuple(self.state[name].shape) == shape, name
        self.taken.add(name)
        if shard is None:
            return self.state[name].clone()
        start, stop = shard.bounds(shape[shard.dim])
        return self.state[name].narrow(shard.dim, start, stop - start).clone()

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        raise AssertionError("these weights are plain")

    def has(self, name: str) -> bool:
        return name in self.state

    def scope(self, prefix: str) -> "StateReader":
        raise AssertionError("latent attention has no parts of its own")


@torch.no_grad()
def reference(version: int, **changes: object) -> Reference:
    """A module with random weights, all its biases and norms included."""
    modeling, make_config = (v2, DeepseekV2Config) if version == 2 else (v3, DeepseekV3Config)
    config = make_config(**{**COMMON, **changes}, attn_implementation="eager")
    torch.manual_seed(3)
    name = f"DeepseekV{version}"
    module = getattr(modeling, f"{name}Attention")(config, layer_idx=0).float().eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    x_1TE = torch.randn(1, NUM_TOKENS, config.hidden_size)
    angles = getattr(modeling, f"{name}RotaryEmbedding")(config)(
        x_1TE, torch.arange(NUM_TOKENS).unsqueeze(0)
    )
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
    out_1TE, _ = module(x_1TE, position_embeddings=angles, attention_mask=mask)
    return Reference(config, dict(module.state_dict()), x_1TE[0], out_1TE[0])


def sizes_of(config: DeepseekV2Config | DeepseekV3Config) -> LatentAttentionSizes:
    rope = parse_rope({"rope_parameters": dict(config.rope_parameters)})
    return LatentAttentionSizes(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        scale=latent_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, rope),
        rope_interleaved=getattr(config, "rope_interleave", True),
        attention_bias=config.attention_bias,
    )


def context_of(reader: StateReader, comms: Comms, stream: Layout, *, cpu: bool) -> BuildContext:
    return BuildContext(
        weights=reader,
        comms=comms,
        ops=CpuOps() if cpu else TorchOps(),
        dtype=torch.float32,
        device=CPU,
        format=PlainFormat(),
        stream=stream,
    )


class Rank:
    """One rank's layer, cache and backends."""

    def __init__(self, case: Reference, context: BuildContext, *, cpu: bool) -> None:
        sizes = sizes_of(case.config)
        rope = parse_rope({"rope_parameters": dict(case.config.rope_parameters)})
        table = rope_table(rope, sizes.qk_rope_head_dim, NUM_POSITIONS, CPU)
        assert isinstance(context.weights, StateReader)
        self.layer = LatentAttention(context, context.weights, sizes, 0, table)
        assert context.weights.taken == set(case.weights)
        shape = sizes.kv_shape(1)
        spec = LatentAttentionSpec(
            num_heads=sizes.num_heads // context.comms.axes["tp"].size,
            nope_dim=shape.nope_dim,
            rope_dim=shape.rope_dim,
            value_dim=shape.value_dim,
            latent_dim=shape.latent_dim,
            scale=shape.scale,
            page_size=PAGE_SIZE,
            dtype=torch.float32,
            device=CPU,
            max_context_tokens=NUM_TOKENS,
        )
        backend = (cpu_latent if cpu else torch_ref_latent).build(NoOptions(), spec)
        cache_BPZ = torch.full((8, PAGE_SIZE, shape.token_values), torch.nan)
        self.attention = LatentPagedAttention(
            context.ops, [cache_BPZ], shape.value_dim, shape.latent_dim, backend, backend
        )

    @torch.inference_mode()
    def run(self, x_TE: Tensor, plan: Plan, rank: int, stream: Layout) -> Tensor:
        """Every step's output rows that this rank has, without padding."""
        return torch.cat([self._step(x_TE, plan, rank, stream, *step) for step in STEPS])

    def _step(
        self, x_TE: Tensor, plan: Plan, rank: int, stream: Layout, start: int, length: int
    ) -> Tensor:
        rows = StepRows(plan, rank, (length,))
        x = x_TE.new_zeros(rows.num_padded, x_TE.shape[1])
        x[:length] = x_TE[start : start + length]
        positions = torch.zeros(rows.num_padded, dtype=torch.int64)
        positions[:length] = torch.arange(start, start + length)
        batch = staged(positions, length)
        num_real = length
        if stream is Layout.ROWS:
            x = x.split(rows.part)[plan.axis_index("tp", rank)].clone()
            num_real = rows.real_part
        phase = "decode" if batch.prefill is None else "prefill"
        return self.layer(x, positions, self.attention.step(batch, rows, phase))[:num_real]


def staged(positions_T: Tensor, num_real: int) -> Batch:
    """One sequence over pages that lie anywhere."""
    pages = torch.tensor([5, 2, 7, 1, 4, 3], dtype=torch.int32)
    real = positions_T[:num_real]
    num_cached = int(real[-1]) + 1
    sequences = SequenceBatch(
        [num_real],
        [num_cached],
        torch.tensor([0, num_real], dtype=torch.int32),
        torch.tensor([num_cached], dtype=torch.int32),
        pages.unsqueeze(0),
    )
    return Batch(
        input_ids_T=torch.zeros_like(positions_T),
        positions_T=positions_T,
        kv_slots_T=pages[real // PAGE_SIZE].long() * PAGE_SIZE + real % PAGE_SIZE,
        num_real=torch.tensor([num_real], dtype=torch.int32),
        num_decodes=int(num_real == 1),
        decode=sequences if num_real == 1 else None,
        prefill=None if num_real == 1 else sequences,
    )


CASES = {
    "v3": (3, {"q_lora_rank": 28, "rope_parameters": YARN}),
    "v3-direct-queries": (3, {"q_lora_rank": None, "rope_parameters": PLAIN}),
    "v3-halves": (3, {"q_lora_rank": 28, "rope_parameters": YARN, "rope_interleave": False}),
    "v3-biased": (3, {"q_lora_rank": 28, "rope_parameters": PLAIN, "attention_bias": True}),
    "v3-biased-direct": (
        3,
        {"q_lora_rank": None, "rope_parameters": PLAIN, "attention_bias": True},
    ),
    "v2": (2, {"q_lora_rank": 28, "rope_parameters": YARN}),
    "v2-lite": (2, {"q_lora_rank": None, "rope_parameters": YARN}),
    "v2-plain": (2, {"q_lora_rank": None, "rope_parameters": PLAIN}),
    "v2-wide-values": (2, {"q_lora_rank": None, "rope_parameters": YARN, "v_head_dim": 40}),
}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cpu", [False, True], ids=["torch", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_transformers(name: str, cpu: bool) -> None:
    version, changes = CASES[name]
    case = reference(version, **changes)
    assert case.expected_TE.std() > 0.1
    context = context_of(StateReader(case.weights), SOLO, Layout.REPLICATED, cpu=cpu)
    found = Rank(case, context, cpu=cpu).run(case.x_TE, Plan(), 0, Layout.REPLICATED)
    assert_close(found, case.expected_TE)


@pytest.mark.parametrize("stream", [Layout.REPLICATED, Layout.ROWS])
@pytest.mark.parametrize("name", ["v3", "v2-lite", "v3-biased-direct"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_agree_with_transformers(name: str, tp: int, stream: Layout) -> None:
    version, changes = CASES[name]
    case = reference(version, **changes)
    plan = Plan(tp_attn=tp, ep=tp)
    comms = plan_comms(plan)
    ranks = {id(of_rank): rank for rank, of_rank in enumerate(comms)}

    def work(of_rank: Comms) -> Tensor:
        context = context_of(StateReader(case.weights), of_rank, stream, cpu=True)
        rank = ranks[id(of_rank)]
        return Rank(case, context, cpu=True).run(case.x_TE, plan, rank, stream)

    results = run_ranks(comms, work)
    if stream is Layout.REPLICATED:
        for result in results:
            assert_close(result, case.expected_TE)
        return
    parts = [[StepRows(plan, r, (n,)).real_part for _, n in STEPS] for r in range(tp)]
    split = [result.split(counts) for result, counts in zip(results, parts, strict=True)]
    whole = torch.cat([rows for step in zip(*split, strict=True) for rows in step])
    assert_close(whole, case.expected_TE)


def test_an_idle_replica_computes_nothing() -> None:
    case = reference(3, q_lora_rank=28)
    context = context_of(StateReader(case.weights), SOLO, Layout.REPLICATED, cpu=False)
    rank = Rank(case, context, cpu=False)
    rows = StepRows(Plan(), 0, (0,))
    step = rank.attention.step(staged(torch.arange(3), 3), rows, "decode")
    empty_TE = case.x_TE[:0]
    assert rank.layer(empty_TE, torch.empty(0, dtype=torch.int64), step).shape == empty_TE.shape


def test_the_three_forms_of_the_expansion_agree() -> None:
    case = reference(3, q_lora_rank=28)
    context = context_of(StateReader(case.weights), SOLO, Layout.REPLICATED, cpu=False)
    sizes = sizes_of(case.config)
    forms = LatentExpansion(context, context.weights, sizes)
    cached_XZ = torch.randn(9, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
    q_THN = torch.randn(5, sizes.num_heads, sizes.qk_nope_head_dim)
    keys, values = forms.expand(cached_XZ)
    scores = torch.einsum("thn,xhn->thx", q_THN, keys)
    latents_XC = cached_XZ[:, : sizes.kv_lora_rank]
    absorbed_THC = torch.full((5, sizes.num_heads, sizes.kv_lora_rank), torch.nan)
    forms.absorb(q_THN, absorbed_THC)
    assert_close(torch.einsum("thc,xc->thx", absorbed_THC, latents_XC), scores)
    weighted_THC = torch.einsum("thx,xc->thc", scores, latents_XC)
    restored_THV = torch.full((5, sizes.num_heads, sizes.v_head_dim), torch.nan)
    forms.restore(weighted_THC, restored_THV)
    torch.testing.assert_close(
        restored_THV,
        torch.einsum("thx,xhv->thv", scores, values),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("rope", [YARN, PLAIN, {**YARN, "mscale_all_dim": 0.0}])
@pytest.mark.parametrize("version", [2, 3])
def test_scale_is_that_of_transformers(version: int, rope: dict[str, object]) -> None:
    case = reference(version, q_lora_rank=None, rope_parameters=rope)
    modeling = v2 if version == 2 else v3
    module = getattr(modeling, f"DeepseekV{version}Attention")(case.config, layer_idx=0)
    assert sizes_of(case.config).scale == pytest.approx(module.scaling, rel=1e-12)
    assert sizes_of(case.config).kv_shape(7).token_values == 28
