"""What the families of decoders share; a model plugin adds how its config.json reads.

Importing this module does not import torch: only `build` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from core.interfaces.model import BuildContext, Model, ModelSpec
from core.layers.attention.gqa_spec import GroupedQuerySizes
from core.layers.decoder.decoder_spec import DecoderSpec
from core.parallel.plan import Plan
from core.parallel.sharding import cut_problems, head_problems, size_problems

Clauses = Callable[[int], list[str]]  # number of ranks -> what is wrong with it


class DecoderFamily(ABC):
    """A family whose models are `core.layers.decoder.decoder.Decoder`s (core.interfaces.model)."""

    @abstractmethod
    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read the contents of a config.json. Raises ModelError for what is not supported."""

    def plan_problems(self, spec: ModelSpec, plan: Plan) -> list[str]:
        """What is cut must divide: heads over the ranks of an attention group, dense MLPs over
        those of the axis "dense", each expert over tp_expert; quantised weights between blocks."""
        assert isinstance(spec, DecoderSpec)
        by_setting: dict[tuple[str, int], list[Clauses]] = {}
        for axis, clauses in _cuts(spec, plan):
            by_setting.setdefault((_setting(plan, axis), plan.axis_size(axis)), []).append(clauses)
        return [
            problem
            for (setting, ranks), found in by_setting.items()
            for problem in cut_problems(setting, ranks, _all_of(found), spec.num_heads)
        ]

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        """Build one rank's part."""
        from core.layers.decoder.decoder import Decoder

        assert isinstance(spec, DecoderSpec)
        return Decoder(spec, context)


def _cuts(spec: DecoderSpec, plan: Plan) -> list[tuple[str, Clauses]]:
    """Mesh axes, and what is wrong with cutting a part of this model over some number of ranks."""
    block = None if spec.quantization is None else spec.quantization.rows
    cuts = [("tp", _attention_clauses(spec, block))]
    if spec.moe is None or len(spec.moe.layers) < spec.num_layers:
        dense = {"intermediate_size": spec.dense_mlp.intermediate_size}
        cuts.append(("dense", lambda ranks: size_problems(dense, ranks, block)))
    if spec.experts is not None:
        expert = {"size of one expert": spec.experts.expert_intermediate_size}
        cuts.append(("tp_expert", lambda ranks: size_problems(expert, ranks, block)))
        shared_size = spec.experts.shared_intermediate_size
        # A rank with rows of its own has all of the shared experts.
        if shared_size is not None and not plan.cuts_rows(has_experts=True):
            shared = {"size of the shared experts": shared_size}
            cuts.append(("tp", lambda ranks: size_problems(shared, ranks, block)))
    return cuts


def _attention_clauses(spec: DecoderSpec, block: int | None) -> Clauses:
    attention, heads = spec.attention, spec.num_heads
    if isinstance(attention, GroupedQuerySizes):
        q_size = output_size = heads * attention.head_dim
        num_kv_heads = attention.num_kv_heads
        kv_size = num_kv_heads * attention.head_dim
    else:  # all heads share one latent, and what expands it is kept unquantised
        q_size, output_size = heads * attention.qk_head_dim, heads * attention.v_head_dim
        num_kv_heads, kv_size = 1, 0

    def clauses(ranks: int) -> list[str]:
        found = head_problems(heads, num_kv_heads, ranks)
        if found or block is None:
            return found
        sizes = {"query projection": q_size, "output projection": output_size}
        kv_ranks = min(ranks, num_kv_heads)  # more of them hold the same heads
        return size_problems(sizes, ranks, block) + size_problems(
            {"key and value projections": kv_size}, kv_ranks, block
        )

    return clauses


def _all_of(parts: list[Clauses]) -> Clauses:
    return lambda ranks: [clause for part in parts for clause in part(ranks)]


def _setting(plan: Plan, axis: str) -> str:
    """What the user set that decides how many ranks an axis has."""
    spread = {"tp": ("dp_attention", plan.dp), "tp_expert": ("ep", plan.ep)}
    if axis == "dense" and plan.tp_dense is not None:
        return f"parallel.dense_tp={plan.tp_dense}"
    key, divisor = spread["tp" if axis == "dense" else axis]
    if divisor == 1:
        return f"parallel.tp={plan.axis_size(axis)}"
    return f"parallel.tp / parallel.{key} = {plan.stage_size} / {divisor}"
