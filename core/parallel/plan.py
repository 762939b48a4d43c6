"""A parallelism plan: frozen integers, no torch, no process groups.

Two views of the same ranks: dense `pp x dp x tp_attn` and sparse `pp x ep x tp_expert`, with
equal products. Ranks are numbered with the last axis fastest.
"""

from dataclasses import dataclass

from core.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of every mesh axis, for one replica."""

    pp: int = 1
    dp: int = 1  # data-parallel attention
    tp_attn: int = 1
    ep: int = 1
    tp_expert: int = 1
    dp_lm_head: bool = False
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        dense, sparse = self.dp * self.tp_attn, self.ep * self.tp_expert
        if dense != sparse:
            raise PlanError(
                [
                    f"the dense view dp x tp_attn = {self.dp} x {self.tp_attn} = {dense} and the "
                    f"sparse view ep x tp_expert = {self.ep} x {self.tp_expert} = {sparse} "
                    "must cover the same ranks"
                ]
            )

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.dp * self.tp_attn

    def axis_size(self, axis: str) -> int:
        """Ranks along a mesh axis: "tp" (attention and dense layers), "ep" or "dp"."""
        return {"tp": self.tp_attn, "ep": self.ep, "dp": self.dp}[axis]

    def axis_index(self, axis: str, rank: int) -> int:
        """The position of `rank` along a mesh axis."""
        assert 0 <= rank < self.world_size
        in_stage = rank % (self.dp * self.tp_attn)
        if axis == "tp":
            return in_stage % self.tp_attn
        if axis == "dp":
            return in_stage // self.tp_attn
        assert axis == "ep", axis
        return in_stage // self.tp_expert
