"""What a plan makes of a model: which rank is where, what it holds, and that nothing is missing.

Reads no weights and starts nothing: each rank's part is built of meta tensors. Knows nothing of how
a report is shown.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from core.cluster.nodes.ports import node_of
from core.engine.build.model import measure_model
from core.errors import ConfigError
from core.interfaces.model import ModelFamily, ModelSpec
from core.layers.decoder.decoder_spec import DecoderSpec
from core.parallel.plan import Plan
from core.weights.manifest import TensorRequest

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank: its place on every axis and what its weights take."""

    rank: int
    node: int
    coordinates: dict[str, int]
    weight_bytes: int
    num_experts: int  # copies of experts it holds, of each layer that has experts


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """All tensors that differ in the numbers of their names only, and are cut alike."""

    name: str  # numbers replaced by *
    num_tensors: int  # in the model
    shape: tuple[int, ...]
    dtype: str  # as it is kept on the device
    num_parts: int  # that each is cut into
    part_shape: tuple[int, ...]
    num_copies: int  # ranks that hold the same part; copies of redundant experts included


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A model over the ranks of a plan."""

    architecture: str
    plan: Plan
    num_nodes: int
    device: str
    dtype: str  # of activations and cache, and of weights that are not quantised
    num_parameters: int  # of the model
    num_distinct: int  # parameters that some rank holds, each counted once: the same number
    weight_bytes: int  # of all ranks
    kv_token_bytes: int  # that one token's cache takes on each rank of its attention group
    ranks: list[RankReport]
    tensors: list[TensorReport]


def plan_report(
    family: ModelFamily,
    spec: ModelSpec,
    plan: Plan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_nodes: int = 1,
    group_bits: Mapping[str, int] | None = None,
) -> PlanReport:
    """Build every rank's part of a model and add up. Layers that are alike are built once.

    `device` is the type that weights would be kept on: quantised ones stay so on "cuda".
    `group_bits`: of matrices that a CPU keeps in groups, by name; None: none are. The plan must fit
    the model (`core.resolve`). Raises ConfigError where nodes don't divide its ranks.
    """
    size = plan.world_size
    if num_nodes < 1 or size % num_nodes != 0:
        allowed = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            f"{num_nodes} nodes can't have equally many of the {size} ranks of the plan; "
            f"allowed: {allowed}"
        )
    sample = _Sample.of(spec, alike=not group_bits)
    takes_of: list[list[TensorRequest]] = []
    kv_values = 0
    for rank in range(size):
        model, shapes = measure_model(
            family, sample.spec, plan, rank, dtype=dtype, device=device, group_bits=group_bits
        )
        takes_of.append(shapes.manifest)
        kv_values = model.kv.token_values
    holders = _holders(takes_of)
    ranks = [
        RankReport(
            rank=rank,
            node=node_of(rank, plan, num_nodes),
            coordinates=plan.coordinates(rank),
            weight_bytes=sum(sample.copies(take) * take.num_local_bytes for take in takes),
            num_experts=_num_experts(spec, plan),
        )
        for rank, takes in enumerate(takes_of)
    ]
    whole = {take.name: sample.copies(take) * math.prod(take.shape) for take in _all(takes_of)}
    return PlanReport(
        architecture=spec.architecture,
        plan=plan,
        num_nodes=num_nodes,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(whole.values()),
        num_distinct=sum(
            sample.copies(parts[0]) * _num_distinct(parts)
            for parts in {parts[0].name: parts for parts in holders}.values()
        ),
        weight_bytes=sum(rank.weight_bytes for rank in ranks),
        kv_token_bytes=kv_values * spec.num_layers * dtype.itemsize,
        ranks=ranks,
        tensors=_tensor_reports(holders, sample),
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """A model with one layer of each kind, which stands for all of them."""

    spec: ModelSpec
    layer_copies: Mapping[int, int]  # layers of the model that are like a layer of the sample

    @classmethod
    def of(cls, spec: ModelSpec, *, alike: bool = True) -> "_Sample":
        """The sample of a model. What is no `DecoderSpec`, or has layers of one kind that are not
        `alike` (GGUF files keep some in more bits), is its own sample."""
        if not alike or not isinstance(spec, DecoderSpec):
            return cls(spec, dict.fromkeys(range(spec.num_layers), 1))
        num_expert_layers = len(spec.moe.layers) if spec.moe else 0
        counts = [spec.num_layers - num_expert_layers, num_expert_layers]
        copies = dict(enumerate(count for count in counts if count))
        moe = replace(spec.moe, layers=(len(copies) - 1,)) if spec.moe else None
        return cls(replace(spec, num_layers=len(copies), moe=moe), copies)

    def copies(self, take: TensorRequest) -> int:
        """How many tensors of the model one of the sample stands for."""
        found = _LAYER.match(take.name)
        return self.layer_copies[int(found[1])] if found else 1


def _all(takes_of: Iterable[Iterable[TensorRequest]]) -> Iterator[TensorRequest]:
    for takes in takes_of:
        yield from takes


def _holders(takes_of: Iterable[Iterable[TensorRequest]]) -> list[list[TensorRequest]]:
    """By tensor: what the ranks take of it, all of them cut the same way. One that a rank keeps in
    two forms (a table of tokens that is the head in groups as well) counts as two."""
    by_form: dict[tuple[str, int], list[TensorRequest]] = {}
    for take in _all(takes_of):
        by_form.setdefault((take.name, take.group_bits), []).append(take)
    for (name, _), parts in by_form.items():
        cuts = {(take.dim, _num_parts(take), take.shape, take.dtype) for take in parts}
        assert len(cuts) == 1, f"ranks cut {name} in different ways: {cuts}"
    return list(by_form.values())


def _num_parts(take: TensorRequest) -> int:
    return take.shard.count if take.shard else 1


def _num_distinct(parts: list[TensorRequest]) -> int:
    """Values of one tensor that some rank holds, padding not counted."""
    size = parts[0].shape[parts[0].dim]
    held = {take.bounds for take in parts}
    return sum(stop - start for start, stop in held) * (math.prod(parts[0].shape) // size)


def _num_experts(spec: ModelSpec, plan: Plan) -> int:
    return (spec.moe.num_experts + plan.redundant_experts) // plan.ep if spec.moe else 0


def _tensor_reports(holders: list[list[TensorRequest]], sample: _Sample) -> list[TensorReport]:
    """Tensors of one name pattern, shape and cut, together; in the order of the model."""
    merged: dict[tuple[str, tuple[int, ...], int, str], TensorReport] = {}
    for parts in holders:
        take = parts[0]
        pattern = _NUMBER.sub("*", take.name)
        dtype = str(take.dtype).removeprefix("torch.")
        if take.group_bits:
            dtype = f"{take.group_bits}-bit groups"
        key = (pattern, take.shape, _num_parts(take), dtype)
        held = [part.bounds for part in parts]
        found = merged.get(key)
        merged[key] = TensorReport(
            name=pattern,
            num_tensors=sample.copies(take) + (found.num_tensors if found else 0),
            shape=take.shape,
            dtype=dtype,
            num_parts=_num_parts(take),
            part_shape=take.local_shape,
            num_copies=max(max(map(held.count, set(held))), found.num_copies if found else 0),
        )
    return list(merged.values())
