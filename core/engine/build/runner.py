"""What runs a rank's steps: the pool, the slots, attention backends and the sampler.

Reads no weight and measures nothing.
"""

from collections.abc import Iterator
from typing import Any

from core.engine.build.context import RankContext
from core.engine.build.loaded import Loaded
from core.engine.build.memory import (
    PoolSize,
    allocate_latent_pool,
    allocate_pool,
)
from core.engine.build.model import (
    stream_of,
)
from core.engine.run.expert_balance import make_expert_balancer
from core.engine.run.runner import ModelRunner
from core.engine.sample.choosing import make_chooser
from core.engine.sample.processors import ProcessorChain
from core.engine.sample.sampler import Sampler
from core.engine.step.attention import PagedAttention
from core.engine.step.batch import SlotState
from core.engine.step.decode_graphs import make_steps
from core.engine.step.forward import AttentionOfRank, RankParts
from core.engine.step.latent_attention import LatentPagedAttention
from core.interfaces.attention import AttentionSpec
from core.interfaces.latent_attention import LatentAttentionSpec
from core.interfaces.model import LatentKVShape
from core.interfaces.sampling import ProcessorSpec
from core.parallel.layout import Layout
from core.resolve import attention_family
from core.settings.config import AppConfig


def build_runner(
    config: AppConfig, context: RankContext, loaded: Loaded, pool: PoolSize, max_model_len: int
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
        processors=_build_processors(config, context, loaded),
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
        expert_balancer=make_expert_balancer(
            loaded.model.expert_layers,
            context.comms.axes["world"],
            config.parallel.eplb,
            loaded.spec,
            context.plan,
            num_nodes=config.launch.nnodes,
            rows_are_cut=stream is Layout.ROWS,
        ),
    )


def _build_processors(config: AppConfig, context: RankContext, loaded: Loaded) -> ProcessorChain:
    """All logits processors that requests may name."""
    spec = ProcessorSpec(
        max_slots=config.engine.running_limit,
        vocab_size=loaded.spec.vocab_size,
        device=context.device,
    )
    return ProcessorChain(context.plugins.table("logits_processor").create_all(config), spec)


def _build_attention(
    config: AppConfig, context: RankContext, loaded: Loaded, pool: PoolSize, max_model_len: int
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
