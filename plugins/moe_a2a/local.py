"""Rows stay where they are: a rank has all experts, or it has all rows of those that share them.

In the second case the ids of rows are those of its own experts, or -1 (core.layers.experts.router),
and what it returns is its part of a sum over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Routes
from core.plugin.hookspecs import NoOptions


class LocalDispatcher:
    """Carries nothing: experts take rows where they lie, and sum the results of each."""

    layout = ExpertLayout.ROUTED
    capturable = True

    def __init__(self, options: NoOptions, spec: A2ASpec) -> None:
        self._no_counts = torch.empty(0, dtype=torch.int64, device=spec.device)

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """The rows themselves."""
        routes = Routes(experts_TK, weights_TK)
        return Dispatched(x_TE, self._no_counts, handle=None, routes=routes)

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The experts' sums themselves."""
        return output
