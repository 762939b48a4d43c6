"""Model families: what a model plugin registers and what the engine runs.

Importing this module does not import torch, so that a launcher can read a model's sizes cheaply.
Shape legend: T rows of a step, R rows whose logits are wanted, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from core.parallel.layout import Layout
from core.parallel.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.interfaces.attention import AttentionStep
    from core.interfaces.comm import Comms, Communicator
    from core.interfaces.latent_attention import LatentAttentionStep
    from core.interfaces.moe_a2a import Dispatcher
    from core.interfaces.ops import Ops
    from core.interfaces.weights import WeightFormat, WeightReader
    from core.parallel.experts import LayerPlacement
    from core.parallel.rows import StepRows


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """The routed experts of a model, as plans and dispatchers need them."""

    num_experts: int  # logical, of each MoE layer
    top_k: int
    intermediate_size: int  # of one expert
    layers: tuple[int, ...]  # indices of the layers that have experts
    num_groups: int = 1  # groups of experts that routing chooses among


@dataclass(frozen=True, slots=True)
class BlockQuantization:
    """Weights stored as float8_e4m3fn with one scale for each block (rows, columns)."""

    rows: int
    columns: int


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
    max_position_embeddings: int  # longest context, in tokens, extension by YaRN included
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"
    moe: MoESpec | None = None
    quantization: BlockQuantization | None = None  # of linear and expert weights
    latent_attention: bool = False  # MLA: the model needs a latent_attention backend
    # How the names of stored tensors begin that are no part of what is run (a checkpoint's extra
    # layers for drafting tokens); a reader doesn't call them surplus.
    ignored_tensors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what a user should know of the config; shown once at start


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertContext:
    """What MoE layers are built with. Layers that only are measured get no dispatchers."""

    placements: Mapping[int, LayerPlacement]  # by layer index
    dispatchers: Mapping[str, Dispatcher]  # by phase: "prefill" and "decode"
    uniform_routing: bool = False  # experts are drawn at random, for benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What a model is built from, on one rank."""

    weights: WeightReader
    comms: Comms
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    format: WeightFormat  # how linear and expert weights are stored on this device
    # How rows lie over tp between the blocks of a layer: REPLICATED, or ROWS where the rows
    # of a step are shared out among ranks (experts or attention are spread over them).
    stream: Layout = Layout.REPLICATED
    head_axis: str = "tp"  # the ranks that share the output head: "tp" or "world"
    experts: ExpertContext | None = None  # given where the model's spec has `moe`


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The KV cache one rank of a model needs, per token and layer: k and v of (G, D) each."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of q.k

    @property
    def token_values(self) -> int:
        """Numbers stored for one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentKVShape:
    """The cache of a model with latent attention: one vector for each token and layer."""

    num_layers: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    scale: float  # of q.k

    @property
    def token_values(self) -> int:
        """Numbers stored for one token in one layer."""
        return self.latent_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class WantedRows:
    """The only rows of a step whose final hidden states are read, in the order in which they are
    returned. Of the others the last layer has to compute no more than keys and values."""

    index_R: Tensor  # int64 on the device: which rows of the step
    rows: StepRows  # counts R
    num_real: Tensor  # int32 (1,) on the device: how many of them are no padding


@dataclass(frozen=True, slots=True)
class ModelStep:
    """What a model gets beside ids and positions in one step."""

    attention: AttentionStep
    latent_attention: LatentAttentionStep
    rows: StepRows  # T is `rows.num_padded` where the stream is cut, else `rows.num_real`
    phase: str  # "prefill" where any rank computes a prompt in this step, else "decode"
    # int32 (1,) on the device: rows of this DP rank that are no padding. In a step captured as a
    # CUDA graph `rows` counts those it was captured for, and this alone says how many are real.
    num_real: Tensor
    wanted: WantedRows | None = None  # None: all rows


class ExpertLayer(Protocol):
    """The experts of one layer, for balancing their load while the model serves."""

    layer: int  # index in the model
    placement: LayerPlacement

    def take_counts(self) -> Tensor:
        """Rows this rank has sent to each logical expert since the last call: int64 on the
        device, and starts anew."""
        ...

    def move(self, placement: LayerPlacement) -> None:
        """Exchange expert weights with the other ranks of ep, which all call this between the
        same two steps, and route by the new placement from then on."""
        ...


class BestTokens(Protocol):
    """Finds the largest logits without gathering them; see core.ops.stage.Staging."""

    def best_parts(self, logits_SL: Tensor, first_id: int, num_tokens: int) -> Tensor: ...

    def best_of_parts(self, parts_NSX2: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """What the columns of a rank's part of the logits stand for: the tokens from `first_id` on,
    then padding."""

    comm: Communicator  # of the ranks that share the head; ids rise from rank to rank
    first_id: int
    num_tokens: int


class OutputHead(Protocol):
    """Hidden states -> logits, in two steps: choosing tokens needs no more than the first where the
    ranks that share the head know what is asked of its rows.

    A rows of all ranks that share the head, L columns of the logits that this rank has. All ranks
    that share the head call the same.
    """

    def partial(self, hidden_RE: Tensor, rows: StepRows) -> Tensor:
        """Logits (A, L) in float32. `rows` counts R of every DP rank; those without rows call this
        too."""
        ...

    def whole(self, partial_AL: Tensor, rows: StepRows) -> Tensor:
        """Logits (R, V) in float32 over the whole vocabulary, replicated over tp."""
        ...

    def best(self, partial_AL: Tensor, rows: StepRows, find: BestTokens) -> Tensor:
        """The first of each row's largest logits: ids int64 (R,), replicated over tp."""
        ...


@runtime_checkable
class CutHead(Protocol):
    """An output head that says which columns its ranks have: those of one attention group then
    choose tokens without gathering logits."""

    @property
    def part(self) -> VocabularyPart:
        """The columns of this rank."""
        ...


class Model(Protocol):
    """One rank's part of a model, weights loaded. Collectives happen inside."""

    num_heads: int  # query heads of this rank
    kv: KVShape | LatentKVShape
    expert_layers: Sequence[ExpertLayer]  # empty where it has no experts

    @property
    def head(self) -> OutputHead: ...

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        """Final hidden states (T, E), normalised, replicated over tp; (R, E) where the step says
        which rows are wanted. Ids and positions int64."""
        ...

    def shortened(self) -> Model:
        """As few layers as launch every kernel of the whole, with the same weights: its answers
        mean nothing, and its steps take little time."""
        ...


class ModelFamily(Protocol):
    """What a model plugin's factory returns. Only `build` may import torch."""

    def parse(self, hf_config: Mapping[str, Any]) -> ModelSpec:
        """Read the contents of a config.json. Raises ModelError for what is not supported."""
        ...

    def plan_problems(self, spec: ModelSpec, plan: Plan) -> list[str]:
        """Why `spec` can't be spread as `plan` says, one sentence each; empty if it can.
        Checks sizes that are cut; how experts divide is checked for all families alike."""
        ...

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        """Build one rank's part, taking its weights from `context.weights`."""
        ...
