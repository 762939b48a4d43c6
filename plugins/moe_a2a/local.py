"""No expert parallelism: every rank of the axis (itself) holds all experts, rows stay here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ConfigError
from core.hookspecs import NoOptions
from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout, Routes


class LocalDispatcher:
    """Carries nothing: experts take rows where they lie, and sum the results of each."""

    layout = ExpertLayout.ROUTED
    capturable = True

    def __init__(self, options: NoOptions, spec: A2ASpec) -> None:
        """Raises ConfigError where experts are spread over ranks."""
        if spec.comm.size != 1:
            raise ConfigError(
                f"moe_a2a.{spec.phase}=local carries rows to no other rank, but the experts lie on "
                f"parallel.ep={spec.comm.size} ranks; set moe_a2a.{spec.phase}=auto"
            )
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
