"""Sizes, routing and checkpoint names of a mixture-of-experts block. Knows nothing of torch."""

from dataclasses import dataclass

from core.interfaces.routing import Routing as Routing  # part of a spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What a checkpoint calls the three matrices of a gated MLP."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


MIXTRAL_NAMES = ExpertNames(gate="w1", up="w3", down="w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayerSpec:
    """A mixture-of-experts block, the same in every layer that has one. Sizes are logical.

    Checkpoint names, below `block`: `gate.weight`, `gate.<bias_name>`, `experts.<i>.<names>.weight`
    and `<shared_name>.{gate,up,down}_proj.weight`. `core.layers.experts.moe` takes a reader that is
    scoped to the block already.
    """

    hidden_size: int
    num_experts: int  # logical ones
    expert_intermediate_size: int
    routing: Routing
    block: str = "mlp"  # below `model.layers.<i>`; Mixtral: "block_sparse_moe"
    has_bias: bool = False  # added to scores when experts are chosen
    gate_name: str = "gate"
    bias_name: str = "e_score_correction_bias"  # below the gate
    experts_name: str = "experts"
    names: ExpertNames = ExpertNames()
    shared_intermediate_size: int | None = (
        None  # of all shared experts together; None: there is none
    )
    shared_name: str = "shared_experts"

    @property
    def top_k(self) -> int:
        """Experts of a row."""
        return self.routing.top_k
