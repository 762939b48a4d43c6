"""Keeps the experts' load even while the model serves: counts rows, places anew, moves weights.

Every rank calls `after_step` after each agreed step, so that all of them gather, decide and move
between the same steps, each for itself from the same numbers. Knows nothing of requests or of how
a layer moves its weights.

A file of loads is JSON: {"layers": {"3": [rows of expert 0, rows of expert 1, ...], ...}}, by the
index of the layer. `GET /expert_load` answers in that form.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from core.errors import ConfigError
from core.interfaces.comm import Communicator
from core.interfaces.messages import ExpertLoads
from core.interfaces.model import ExpertLayer, ModelSpec
from core.parallel.eplb import balanced_placement, imbalance, nodes_of_groups
from core.parallel.experts import LayerPlacement, default_placement
from core.parallel.plan import Plan
from core.settings.config import ExpertBalanceConfig

# Steps between two sums over all ranks, at most: often enough for metrics, too rare to be felt.
GATHER_STEPS = 100
# Steps until a sum is read on the host: it was copied there long before, so nobody waits.
READ_DELAY_STEPS = 4

Rows = list[list[int]]  # of each layer and logical expert


class ExpertBalancer(Protocol):
    """What a rank's runner calls; both methods are for one thread each."""

    def after_step(self) -> None:
        """An agreed step was launched. Holds collectives: every rank calls it, between the same
        steps."""
        ...

    def take_loads(self) -> ExpertLoads | None:
        """The newest rows of all experts, once; None where nothing came since the last call."""
        ...


class NoExpertBalancer:
    """The expert balancer of a model without experts."""

    def after_step(self) -> None:
        pass

    def take_loads(self) -> ExpertLoads | None:
        return None


@dataclass(frozen=True, slots=True)
class _Gathered:
    """A sum over all ranks on its way to the host."""

    rows_LX: Tensor
    event: torch.cuda.Event | None
    read_at: int  # step
    rebalances: bool


class EplbBalancer:
    """The expert balancer of one rank. Counts from when it is made."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        world: Communicator,
        config: ExpertBalanceConfig,
        *,
        num_groups: int = 1,
        num_nodes: int = 1,
        times_counted: int = 1,
    ) -> None:
        """`world`: all ranks of the stage. `num_nodes` as `nodes_of_groups` says. Each row is
        counted on `times_counted` ranks: all those that compute the same rows."""
        self._layers, self._world, self._config = layers, world, config
        self._num_groups, self._num_nodes = num_groups, num_nodes
        self._times_counted = times_counted
        self._step = 0
        self._gathered: deque[_Gathered] = deque()
        self._total: Rows = [[0] * layer.placement.num_logical for layer in layers]
        self._window: Rows = [list(rows) for rows in self._total]  # since the last rebalancing
        self._target: Rows = []  # what the layers in `_to_move` are placed by
        self._to_move: deque[int] = deque()  # indices into `layers`
        self._news: deque[tuple[Rows, Rows]] = deque(maxlen=1)  # totals, and what came last
        for layer in layers:
            layer.take_counts()  # of warming up

    def after_step(self) -> None:
        """Gather or read counts, or move some layers, as it is time for."""
        self._step += 1
        while self._gathered and self._gathered[0].read_at <= self._step:
            self._read(self._gathered.popleft())
        self._move_some()
        interval = self._config.interval_steps
        rebalances = interval > 0 and self._step % interval == 0
        if rebalances or self._step % GATHER_STEPS == 0:
            self._gather(rebalances)

    def take_loads(self) -> ExpertLoads | None:
        """The newest rows of all experts, once. May be called from another thread."""
        try:
            total, last = self._news.pop()
        except IndexError:
            return None
        return ExpertLoads(
            layers=[layer.layer for layer in self._layers],
            rows=total,
            imbalance=[
                imbalance(layer.placement, rows)
                for layer, rows in zip(self._layers, last, strict=True)
            ],
        )

    def _gather(self, rebalances: bool) -> None:
        """Begin to sum the counts over all ranks; waits for no device."""
        rows_LX = self._world.all_reduce(torch.stack([x.take_counts() for x in self._layers]))
        event = None
        if rows_LX.is_cuda:
            rows_LX = rows_LX.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._gathered.append(_Gathered(rows_LX, event, self._step + READ_DELAY_STEPS, rebalances))

    def _read(self, gathered: _Gathered) -> None:
        """Add a sum to the loads; where it ends an interval, all layers are to be placed anew."""
        if gathered.event is not None:
            gathered.event.synchronize()
        last: Rows = (gathered.rows_LX // self._times_counted).tolist()
        self._total = _sum(self._total, last)
        self._window = _sum(self._window, last)
        self._news.append((self._total, last))
        if gathered.rebalances and not self._to_move:
            self._target = self._window
            self._window = [[0] * len(rows) for rows in self._window]
            self._to_move.extend(range(len(self._layers)))

    def _move_some(self) -> None:
        """Place and move the next layers; each rank finds the same placements."""
        for _ in range(min(self._config.layers_per_step, len(self._to_move))):
            index = self._to_move.popleft()
            layer = self._layers[index]
            placement = balanced_placement(
                self._target[index],
                layer.placement,
                num_groups=self._num_groups,
                num_nodes=self._num_nodes,
            )
            if placement != layer.placement:
                layer.move(placement)


def make_expert_balancer(
    layers: Sequence[ExpertLayer],
    world: Communicator,
    config: ExpertBalanceConfig,
    spec: ModelSpec,
    plan: Plan,
    *,
    num_nodes: int,
    rows_are_cut: bool,
) -> ExpertBalancer:
    """The expert balancer of a rank's model. `num_nodes`: of one stage. `rows_are_cut`: each rank
    routes rows of its own (the stream's layout is ROWS); otherwise all route the same."""
    if not layers or spec.moe is None:
        return NoExpertBalancer()
    return EplbBalancer(
        layers,
        world,
        config,
        num_groups=spec.moe.num_groups,
        num_nodes=_nodes(spec, plan, config, num_nodes),
        times_counted=1 if rows_are_cut else world.size,
    )


def initial_placements(
    spec: ModelSpec, plan: Plan, config: ExpertBalanceConfig, *, num_nodes: int = 1
) -> dict[int, LayerPlacement]:
    """Where the experts of each layer are at start: in order, or by the loads of
    `parallel.eplb.load_file`. Raises ConfigError naming what is wrong with that file."""
    if spec.moe is None:
        return {}
    start = default_placement(spec.moe.num_experts, plan.ep, plan.redundant_experts)
    placements = dict.fromkeys(spec.moe.layers, start)
    nodes = _nodes(spec, plan, config, num_nodes)
    if config.load_file is None:
        return placements
    for layer, loads in _read_loads(config.load_file, spec).items():
        placements[layer] = balanced_placement(
            loads, start, num_groups=spec.moe.num_groups, num_nodes=nodes
        )
    return placements


class _LoadFile(msgspec.Struct):
    layers: dict[int, list[int]]


def _read_loads(path: str, spec: ModelSpec) -> Mapping[int, list[int]]:
    assert spec.moe is not None
    what = f"parallel.eplb.load_file={path!r}"
    try:
        with open(path, "rb") as file:
            layers = msgspec.json.decode(file.read(), type=_LoadFile).layers
    except OSError as error:
        raise ConfigError(f"{what} can't be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{what} is no file of expert loads ({error}); needed: what GET /expert_load answered"
        ) from error
    unknown = sorted(layers.keys() - set(spec.moe.layers))
    if unknown:
        raise ConfigError(
            f"{what} has loads of layer {unknown[0]}, which has no experts in this model; layers "
            f"with experts: {spec.moe.layers[0]} to {spec.moe.layers[-1]}"
        )
    for layer, loads in layers.items():
        if len(loads) != spec.moe.num_experts or min(loads) < 0:
            raise ConfigError(
                f"{what} has {len(loads)} loads for layer {layer}; needed: {spec.moe.num_experts} "
                "counts of rows, one for each expert, none below 0"
            )
    return layers


def _nodes(spec: ModelSpec, plan: Plan, config: ExpertBalanceConfig, num_nodes: int) -> int:
    assert spec.moe is not None
    return nodes_of_groups(
        config.strategy,
        num_experts=spec.moe.num_experts,
        num_groups=spec.moe.num_groups,
        ep=plan.ep,
        nodes=num_nodes,
    )


def _sum(first: Rows, second: Rows) -> Rows:
    return [
        [a + b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(first, second, strict=True)
    ]
