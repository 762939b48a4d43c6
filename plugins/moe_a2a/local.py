"""No expert parallelism: every rank of the axis (itself) holds all experts, rows stay here."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from core.errors import ConfigError
from core.hookspecs import NoOptions
from core.interfaces.moe_a2a import A2ASpec, Dispatched, ExpertLayout
from core.kernels.moe_permute import group_rows, sum_results


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` needs of a dispatch."""

    positions_TK: Tensor
    weights_TK: Tensor


class LocalDispatcher:
    """Groups rows by expert, and sums what comes back."""

    layout = ExpertLayout.CONTIGUOUS
    capturable = True

    def __init__(self, options: NoOptions, spec: A2ASpec) -> None:
        """Raises ConfigError where experts are spread over ranks."""
        if spec.comm.size != 1:
            raise ConfigError(
                f"moe_a2a.{spec.phase}=local carries rows to no other rank, but the experts lie on "
                f"parallel.ep={spec.comm.size} ranks; set moe_a2a.{spec.phase}=auto"
            )
        self._spec = spec

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """Rows grouped by expert."""
        grouping = group_rows(experts_TK, self._spec.num_experts)
        handle = _Handle(grouping.positions_TK, weights_TK)
        return Dispatched(x_TE[grouping.source], grouping.counts_L, handle)

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum of each row's results."""
        handle = dispatched.handle
        assert isinstance(handle, _Handle)
        return sum_results(output, handle.positions_TK, handle.weights_TK, self._spec.dtype)
