"""A mixture-of-experts block: route, dispatch, compute, combine, add what all rows share.

Takes and returns rows in the stream's layout. Knows nothing of what carries rows between ranks.
Shape legend: T rows in the stream's layout, A rows of all ranks of the axis "tp_expert", E hidden
size, K experts of a row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from core.interfaces.comm import SOLO
from core.interfaces.model import BuildContext, ModelStep
from core.interfaces.weights import WeightReader
from core.layers.basic.mlp import PartialMLP
from core.layers.basic.row_exchange import ALONE, row_exchange
from core.layers.experts.experts import LocalExperts
from core.layers.experts.moe_spec import MoELayerSpec
from core.layers.experts.router import Router
from core.parallel.layout import Layout
from core.parallel.rows import StepRows

_AXIS = "tp_expert"


class MoELayer:
    """Routed and shared experts of one layer. `weights` are scoped to the block.

    With replicated rows the shared experts are cut over the ranks of tp, and all experts' sums are
    added up at once. With rows shared out each rank computes the shared experts whole for its own.
    They need nothing of routing, and are computed beside it.
    """

    def __init__(
        self, context: BuildContext, weights: WeightReader, spec: MoELayerSpec, layer: int
    ) -> None:
        assert context.experts is not None, "a model with experts is built with dispatchers"
        self._shared_out = context.stream is Layout.ROWS
        ep, tp_expert = (context.comms.axes[axis] for axis in ("ep", _AXIS))
        # Rows that all ranks have may have experts on any of them.
        axis = _AXIS if self._shared_out else "tp"
        assert self._shared_out or context.comms.axes["tp"].size == ep.size * tp_expert.size
        self.experts = LocalExperts(context, weights, spec, layer)
        self._router = Router(context, weights, spec)
        self._dispatchers = context.experts.dispatchers
        self._exchange = row_exchange(context, axis)
        self._shared = _shared_experts(context, weights, spec)
        # Shared experts of own rows are added behind the sum, which then can't wait for the norm.
        self._adds_behind = self._shared_out and self._shared is not None
        self.exchange = ALONE if self._adds_behind else self._exchange
        self._gathers_routes = self._shared_out and tp_expert.size > 1
        self._beside = context.ops.beside

    def __call__(self, x_TE: Tensor, step: ModelStep) -> Tensor:
        return self.exchange.scatter(self.partial(x_TE, step), step.rows)

    def partial(self, x_TE: Tensor, step: ModelStep) -> Tensor:
        """What `exchange` is yet to sum up."""
        rows = step.rows
        shared = None if self._shared is None else self._beside(self._shared, x_TE)
        first_row = rows.first_of_part if self._shared_out else 0
        destinations = self.experts.destinations(step.num_real, first_row)
        weights_TK, physical_TK = self._router(x_TE, destinations)
        x_AE = self._exchange.gather(x_TE, rows)
        physical_AK, weights_AK = self._gather_routes(physical_TK, weights_TK, rows)
        counts = rows_by_ep(rows) if self._shared_out else (x_AE.shape[0],)
        dispatcher = self._dispatchers[step.phase]
        dispatched = dispatcher.dispatch(x_AE, physical_AK, weights_AK, counts)
        partial_AE = dispatcher.combine(self.experts(dispatched), dispatched)
        if shared is None:
            return partial_AE
        if self._adds_behind:
            return self._exchange.scatter(partial_AE, rows) + shared()
        return partial_AE + shared()

    def _gather_routes(
        self, physical_TK: Tensor, weights_TK: Tensor, rows: StepRows
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights of all ranks of the axis, in one exchange."""
        if not self._gathers_routes:
            return physical_TK, weights_TK
        # Ids are far below 2^24, where float32 stops to hold every whole number.
        both_T2K = torch.cat((physical_TK.float(), weights_TK), dim=1)
        physical_AK, weights_AK = self._exchange.gather(both_T2K, rows).chunk(2, dim=1)
        return physical_AK.long(), weights_AK.contiguous()


def _shared_experts(
    context: BuildContext, weights: WeightReader, spec: MoELayerSpec
) -> Callable[[Tensor], Tensor] | None:
    """A part of their sum over tp; all of it where rows are shared out."""
    if spec.shared_intermediate_size is None:
        return None
    whole = context.stream is Layout.ROWS
    return PartialMLP(
        replace(context, comms=SOLO) if whole else context,
        weights.scope(spec.shared_name),
        spec.hidden_size,
        spec.shared_intermediate_size,
        bias=False,
        axis="tp",
    )


@lru_cache(maxsize=16)  # every layer of a step asks the same
def rows_by_ep(rows: StepRows) -> tuple[int, ...]:
    """Rows that each rank of this rank's ep axis enters with: its own and those it gathered from
    the ranks it shares experts with."""
    plan = rows.plan
    return tuple(
        sum(rows.part_of(sharer) for sharer in plan.group(_AXIS, peer))
        for peer in plan.group("ep", rows.rank)
    )
