"""Model families: what a model plugin registers and what the engine runs.

Importing this module does not import torch, so that a launcher can read a model's sizes cheaply.
Shape legend: T rows of a step, R rows whose logits are wanted, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.interfaces.attention import AttentionStep
    from core.interfaces.comm import Comms
    from core.interfaces.ops import Ops
    from core.interfaces.weights import WeightReader


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Logical sizes every family has; families add their own fields in a subclass."""

    architecture: str  # as in config.json, e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # longest context trained for, in tokens
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What a model is built from, on one rank."""

    weights: WeightReader
    comms: Comms
    ops: Ops
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The KV cache one rank of a model needs, per token and layer: k and v of (G, D) each."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of q.k


class Model(Protocol):
    """One rank's part of a model, weights loaded. Collectives happen inside."""

    num_heads: int  # query heads of this rank
    kv: KVShape

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, attention: AttentionStep) -> Tensor:
        """Final hidden states (T, E), normalised, replicated over tp. Ids and positions int64."""
        ...

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Logits (R, V) in float32 over the whole vocabulary, replicated over tp."""
        ...


class ModelFamily(Protocol):
    """What a model plugin's factory returns. Only `build` may import torch."""

    def parse(self, hf_config: Mapping[str, Any]) -> ModelSpec:
        """Read the contents of a config.json. Raises ModelError for what is not supported."""
        ...

    def plan_problems(self, spec: ModelSpec, tp: int) -> list[str]:
        """Why `spec` can't be spread over `tp` ranks, one sentence each; empty if it can."""
        ...

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        """Build one rank's part, taking its weights from `context.weights`."""
        ...
