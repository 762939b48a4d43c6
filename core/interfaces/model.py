"""Model families: what a model plugin registers, and what the engine runs.

Importing this module does not import torch, so a launcher can read the sizes of a model cheaply.
Shape legend: T rows (tokens of a step), R rows whose logits are wanted, E hidden size, V
vocabulary.
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
    """The routed experts of a model, as parallel plans and dispatchers need them."""

    num_experts: int  # logical, of each MoE layer
    top_k: int
    intermediate_size: int  # of one expert
    layers: tuple[int, ...]  # indices of the layers that have experts
    num_groups: int = 1  # groups of experts among which routing chooses


@dataclass(frozen=True, slots=True)
class BlockQuantization:
    """Weights are stored as float8_e4m3fn, with one scale for each block of rows x columns."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Logical sizes that every family has. A family adds its own fields in a subclass."""

    architecture: str  # as in config.json, e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # longest context in tokens, with the extension by YaRN
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"
    moe: MoESpec | None = None
    quantization: BlockQuantization | None = None  # of linear and expert weights
    latent_attention: bool = False  # MLA: the model needs a latent_attention backend
    # Prefixes of stored tensors that are not used (such as a checkpoint's additional layers for
    # speculative decoding). The reader does not report them as surplus.
    ignored_tensors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # about the config, for the user; shown once at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertContext:
    """What MoE layers are built from. Layers that are only measured get no dispatchers."""

    placements: Mapping[int, LayerPlacement]  # by layer index
    dispatchers: Mapping[str, Dispatcher]  # by phase: "prefill" and "decode"
    uniform_routing: bool = False  # experts are chosen at random, for benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What a model is built from, on one rank."""

    weights: WeightReader
    comms: Comms
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    format: WeightFormat  # how linear and expert weights are stored on this device
    # Layout of hidden states over tp between the blocks of a layer: REPLICATED; or ROWS, if the
    # rows of a step are divided among ranks (because experts or attention are spread over them).
    stream: Layout = Layout.REPLICATED
    head_axis: str = "tp"  # the ranks that share the output head: "tp" or "world"
    experts: ExpertContext | None = None  # set if the model's spec has `moe`


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The KV cache that one rank needs for each token and layer: k and v of (G, D) each."""

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
    """The rows of a step whose final hidden states are read, in the order of the result.

    For all other rows the last layer only has to compute keys and values."""

    index_R: Tensor  # int64 on the device: indices of rows of the step
    rows: StepRows  # counts R
    num_real: Tensor  # int32 (1,) on the device: how many of them are not padding


@dataclass(frozen=True, slots=True)
class ModelStep:
    """What a model gets in one step, besides ids and positions."""

    attention: AttentionStep
    latent_attention: LatentAttentionStep
    rows: StepRows  # T is `num_padded` if the stream is ROWS, else `num_real`
    phase: str  # "prefill" if any rank computes a prompt in this step, else "decode"
    # int32 (1,) on the device: rows of this DP rank that are not padding. In a step captured as a
    # CUDA graph, `rows` counts the rows that it was captured for; only this is the real number.
    num_real: Tensor
    wanted: WantedRows | None = None  # None: all rows


class ExpertLayer(Protocol):
    """The experts of one layer, to balance their load while the model serves."""

    layer: int  # index in the model
    placement: LayerPlacement

    def take_counts(self) -> Tensor:
        """Return the rows that this rank sent to each logical expert since the last call.

        int64 on the device, one value for each logical expert. Resets the counts."""
        ...

    def move(self, placement: LayerPlacement) -> None:
        """Move expert weights between the ranks of ep, and route by the new placement from now on.

        All ranks of ep call this between the same two steps."""
        ...


class BestTokens(Protocol):
    """Finds the largest logits without gathering all; see core.ops.stage.Staging."""

    def best_parts(self, logits_SL: Tensor, first_id: int, num_tokens: int) -> Tensor: ...

    def best_of_parts(self, parts_NSX2: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """The columns of a rank's part of the logits: tokens from `first_id` on, then padding."""

    comm: Communicator  # of the ranks that share the head; ids ascend from rank to rank
    first_id: int
    num_tokens: int


class OutputHead(Protocol):
    """Computes logits from hidden states, in two steps.

    The first step is enough to choose tokens if all ranks that share the head know the sampling
    parameters of its rows. All ranks that share the head make the same calls.

    Shape legend: A rows of all ranks that share the head, L columns of the logits on this rank.
    """

    def partial(self, hidden_RE: Tensor, rows: StepRows) -> Tensor:
        """Return logits (A, L) in float32.

        `rows` counts R of every DP rank. DP ranks without rows call this too."""
        ...

    def whole(self, partial_AL: Tensor, rows: StepRows) -> Tensor:
        """Return logits (R, V) in float32 of the whole vocabulary, replicated over tp."""
        ...

    def best(self, partial_AL: Tensor, rows: StepRows, find: BestTokens) -> Tensor:
        """Return the id of each row's largest logit, int64 (R,), replicated over tp.

        Of equal logits the lowest id is returned."""
        ...


@runtime_checkable
class CutHead(Protocol):
    """An output head that knows the columns of its ranks.

    The ranks of one attention group can then choose tokens without gathering logits."""

    @property
    def part(self) -> VocabularyPart:
        """The columns of this rank."""
        ...


class Model(Protocol):
    """One rank's part of a model, with loaded weights. It calls its collectives itself."""

    num_heads: int  # query heads of this rank
    kv: KVShape | LatentKVShape
    expert_layers: Sequence[ExpertLayer]  # empty if it has no experts

    @property
    def head(self) -> OutputHead: ...

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        """Return the final hidden states (T, E), normalised, replicated over tp.

        If `step.wanted` is set, return (R, E) of these rows. Ids and positions are int64."""
        ...

    def shortened(self) -> Model:
        """Return a model with only as many layers as are needed to launch every kernel.

        It has the same weights. Its answers mean nothing, and its steps take little time."""
        ...


class ModelFamily(Protocol):
    """What the factory of a model plugin returns. Only `build` may import torch."""

    def parse(self, hf_config: Mapping[str, Any]) -> ModelSpec:
        """Read the contents of a config.json. Raises ModelError for what is not supported."""
        ...

    def plan_problems(self, spec: ModelSpec, plan: Plan) -> list[str]:
        """Return why `spec` does not fit `plan`, one sentence for each reason; empty if it fits.

        Check the sizes that are cut over ranks. The engine checks the number of experts itself."""
        ...

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        """Build one rank's part, with weights from `context.weights`. Raises ModelError."""
        ...
