"""Tiny random checkpoints written by transformers, and what it takes to run a model on them.

Shape legend: T tokens, H and G query and KV heads of a rank, D head dimension, Z = C + R values of
a cached vector (latent and rotary), V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoints.open import open_weights
from core.engine.build.model import (
    build_dispatchers,
    measure_rank,
    model_context,
    stream_of,
)
from core.engine.run.expert_balance import initial_placements
from core.interfaces.attention import HeadTransform
from core.interfaces.comm import SOLO, Comms
from core.interfaces.control import ModelFiles
from core.interfaces.latent_attention import LatentProjections, LatentTransform
from core.interfaces.model import Model, ModelFamily, ModelStep
from core.interfaces.weights import PlainFormat
from core.ops.torch_heads import transform_heads
from core.ops.torch_latent import transform_latent, whole_keys
from core.ops.torch_ops import TorchOps
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows
from core.plugin.plugin_manager import PluginManager
from core.settings.config import (
    AppConfig,
    ExpertBalanceConfig,
    ModelConfig,
    MoEAllToAllConfig,
    PluginChoice,
)
from core.sources.files import resolve_files
from core.testing.model import TINY, write_checkpoint
from core.testing.ranks import plan_comms, run_ranks
from tests.support.formats import FILE_PLUGINS, FORMATS

CPU = torch.device("cpu")
VOCAB_SIZE: int = TINY["vocab_size"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 4, "moe_intermediate_size": 64}
LATENT: dict[str, Any] = EXPERTS | {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,  # what transformers calls the rotary part
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,  # not that of keys
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
    "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.8},
}
GLM: dict[str, Any] = EXPERTS | {
    "attention_bias": True,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
}
# Name of a tiny checkpoint -> (transformers' prefix of the family's classes, config changes).
# "odd" is like SmolLM2: 9 heads over 3 KV heads, so that tp 3 and 9 are what it allows.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_odd": (
        "Llama",
        {
            "hidden_size": 144,
            "intermediate_size": 180,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 48, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    ),
    # Like V2-Lite: queries are projected at once, the best experts of all.
    "deepseek_v2_lite": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT
        | {
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.0,
        },
    ),
    # Half of each head turns.
    "glm4_moe": (
        "Glm4Moe",
        GLM | {"use_qk_norm": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    # Like Air: heads are not normalised, the best experts of all. A quarter turns, as YaRN says.
    "glm4_moe_air": (
        "Glm4Moe",
        GLM
        | {
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rope_parameters": YARN_ROPE | {"partial_rotary_factor": 0.25},
        },
    ),
    # Halves instead of neighbouring pairs turn, biases, scores that are not normalised.
    "deepseek_v3_halves": (
        "DeepseekV3",
        LATENT
        | {
            "q_lora_rank": 48,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_interleave": False,
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
}
EXPERT_MODELS = ("qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v2_lite", "deepseek_v2")


def write_tiny_model(folder: Path, name: str, seed: int = 0, **sizes: Any) -> Path:
    """A Hugging Face folder with random float32 weights and a byte tokenizer. `sizes`: other values
    of its config."""
    import transformers

    prefix, changes = TINY_MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**(TINY | changes | sizes))
    torch.manual_seed(seed)
    return write_checkpoint(getattr(transformers, f"{prefix}ForCausalLM")(config), folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def family_of(hf_config: dict[str, Any]) -> ModelFamily:
    """The built-in family of a config.json."""
    table = PluginManager.load().table("model")
    family: ModelFamily = table.create(PluginChoice(name=hf_config["architectures"][0]))
    return family


def ignore_progress(task: str, done: int, total: int, unit: str) -> None:
    """For callers who don't want to know."""


def folder_files(folder: Path | str) -> ModelFiles:
    """A model's files."""
    return resolve_files(ModelConfig(name="tiny", path=str(folder)), FILE_PLUGINS, ignore_progress)


def build_model(
    files: ModelFiles,
    plan: Plan | None = None,
    rank: int = 0,
    comms: Comms = SOLO,
    dtype: torch.dtype = torch.float32,
    a2a: str = "allgather",
) -> Model:
    """One rank's part of a checkpoint, on the CPU; alone without a plan. `a2a` carries rows to
    experts where they are spread."""
    plan = plan or Plan()
    family = family_of(files.hf_config)
    spec = family.parse(files.hf_config)
    assert not family.plan_problems(spec, plan)
    choice = PluginChoice(name="local" if plan.ep == 1 else a2a)
    model_config = ModelConfig(name="tiny")
    config = AppConfig(model=model_config, moe_a2a=MoEAllToAllConfig(prefill=choice, decode=choice))
    dispatchers = build_dispatchers(
        config, PluginManager.load(), spec, plan, comms, dtype=dtype, device=CPU, max_model_len=512
    )
    reader = open_weights(
        model_config,
        files,
        FORMATS,
        dtype=dtype,
        device=CPU,
        on_progress=ignore_progress,
        spec=spec,
        rank_shapes=measure_rank(family, spec, plan, rank, dtype=dtype, device=CPU),
        model_shapes=measure_rank(family, spec, Plan(), 0, dtype=dtype, device=CPU),
    )
    context = model_context(
        spec=spec,
        plan=plan,
        weights=reader,
        comms=comms,
        ops=TorchOps(),
        dtype=dtype,
        device=CPU,
        weight_format=PlainFormat(),
        placements=initial_placements(spec, plan, ExpertBalanceConfig()),
        dispatchers=dispatchers,
    )
    model = family.build(spec, context)
    reader.finish()
    return model


@dataclass
class DenseAttention:
    """Attention of one sequence that keeps all it has seen: AttentionStep, and LatentAttentionStep
    in its expanded form. Rows past `num_real` are padding."""

    scale: float
    num_real: int
    caches: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def attend(
        self, layer: int, qkv_TFD: Tensor, heads: HeadTransform, positions_T: Tensor
    ) -> Tensor:
        """See core.interfaces.attention."""
        q_THD, k_TGD, v_TGD = transform_heads(TorchOps(), qkv_TFD, heads, positions_T)
        k_TGD, v_TGD = self._cached(layer, k_TGD, v_TGD)
        group = q_THD.shape[1] // k_TGD.shape[1]
        return self._attend(
            q_THD, k_TGD.repeat_interleave(group, 1), v_TGD.repeat_interleave(group, 1)
        )

    def attend_latent(
        self,
        layer: int,
        q_THD: Tensor,
        cached_TZ: Tensor,
        transform: LatentTransform,
        positions_T: Tensor,
        projections: LatentProjections,
    ) -> Tensor:
        """See core.interfaces.latent_attention."""
        turning_THR = q_THD[..., q_THD.shape[-1] - transform.cos_sin_CR.shape[1] :]
        turned_THR, cached_TZ = transform_latent(
            TorchOps(), turning_THR, cached_TZ, transform, positions_T
        )
        turning_THR.copy_(turned_THR)
        (cached_TZ,) = self._cached(layer, cached_TZ)
        k_XHN, v_XHV = projections.expand(cached_TZ)
        rotary_XR = cached_TZ[:, -transform.cos_sin_CR.shape[1] :]
        return self._attend(q_THD, whole_keys(k_XHN, rotary_XR), v_XHV)

    def _cached(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Everything of a layer so far, the new rows included."""
        rows = tuple(x[: self.num_real] for x in new)
        if layer in self.caches:
            rows = tuple(torch.cat(pair) for pair in zip(self.caches[layer], rows, strict=True))
        self.caches[layer] = tuple(x.clone() for x in rows)
        return self.caches[layer]

    def _attend(self, q_THD: Tensor, k_XHD: Tensor, v_XHD: Tensor) -> Tensor:
        new, old = self.num_real, k_XHD.shape[0] - self.num_real
        q, k, v = (x.transpose(0, 1).float() for x in (q_THD[:new], k_XHD, v_XHD))
        hidden = torch.ones(new, old + new, dtype=torch.bool).triu(old + 1)
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(hidden, float("-inf"))
        out_THD = q_THD.new_zeros((*q_THD.shape[:2], v_XHD.shape[-1]))
        out_THD[:new] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out_THD


@torch.inference_mode()
def run_model(model: Model, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
    """Logits (T, V) of a sequence on the only rank there is, in steps of `chunk` tokens."""
    chunk = chunk or len(token_ids)
    counts = [len(token_ids[start : start + chunk]) for start in range(0, len(token_ids), chunk)]
    steps = [StepRows(Plan(), 0, (count,)) for count in counts]
    return _run_steps(model, token_ids, steps, Layout.REPLICATED)


def plan_logits(
    files: ModelFiles,
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    chunk: int | None = None,
    a2a: str = "allgather",
) -> list[Tensor]:
    """Logits (T, V) as each rank of a plan computes them: those of the prompt of its DP rank.
    Prompts may differ in length; who is done idles in the others' steps."""
    spec = family_of(files.hf_config).parse(files.hf_config)
    chunk = chunk or max(map(len, prompts))
    starts = range(0, max(map(len, prompts)), chunk)
    counts = [tuple(len(prompt[start : start + chunk]) for prompt in prompts) for start in starts]

    def run(comms: Comms) -> Tensor:
        rank = comms.axes["world"].rank
        model = build_model(files, plan, rank, comms, a2a=a2a)
        steps = [StepRows(plan, rank, by_dp) for by_dp in counts]
        with torch.inference_mode():
            return _run_steps(
                model, prompts[plan.axis_index("dp", rank)], steps, stream_of(spec, plan)
            )

    return run_ranks(plan_comms(plan), run)


def tp_logits(files: ModelFiles, tp: int, token_ids: Sequence[int]) -> list[Tensor]:
    """Logits (T, V) as each of `tp` ranks computes them."""
    return plan_logits(files, Plan(tp_attn=tp, tp_expert=tp), [token_ids])


def _run_steps(
    model: Model, token_ids: Sequence[int], steps: Sequence[StepRows], stream: Layout
) -> Tensor:
    attention = DenseAttention(model.kv.scale, 0)
    logits, start = [], 0
    for rows in steps:
        attention.num_real = rows.num_real
        num_rows = rows.num_padded if stream is Layout.ROWS else rows.num_real
        padding = (0, num_rows - rows.num_real)
        ids_T = torch.tensor(token_ids[start : start + rows.num_real], dtype=torch.int64)
        positions_T = torch.arange(start, start + rows.num_real)
        step = ModelStep(
            attention,
            attention,
            rows,
            "prefill" if start == 0 else "decode",
            torch.tensor([rows.num_real], dtype=torch.int32),
        )
        hidden_TE = model.forward(
            torch.nn.functional.pad(ids_T, padding),
            torch.nn.functional.pad(positions_T, padding),
            step,
        )
        partial = model.head.partial(hidden_TE[: rows.num_real], rows)
        logits.append(model.head.whole(partial, rows))
        start += rows.num_real
    return torch.cat(logits)
