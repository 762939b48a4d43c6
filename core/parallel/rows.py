"""How many rows of a step each rank holds: pure integers, equal on all ranks.

A row is one token of a step. With data-parallel attention every DP rank has rows of its own; inside
its attention group they are either replicated, or each rank keeps one equal part (padded at the
end to a multiple of the group's ranks). Knows nothing of tensors.
"""

from dataclasses import dataclass

from core.parallel.plan import Plan


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, as rank `rank` of `plan` sees them."""

    plan: Plan
    rank: int
    by_dp: tuple[int, ...]  # real rows of each DP rank

    @property
    def num_real(self) -> int:
        """Rows of this rank's DP rank, without padding."""
        return self.by_dp[self.plan.axis_index("dp", self.rank)]

    @property
    def num_padded(self) -> int:
        """The same, rounded up to a multiple of its attention group's ranks."""
        return self.part * self.plan.tp_attn

    @property
    def part(self) -> int:
        """Rows that this rank keeps where the rows are cut over its attention group."""
        return self.part_of(self.rank)

    @property
    def real_part(self) -> int:
        """How many of `part` are real; padding comes last."""
        return min(max(self.num_real - self.first_of_part, 0), self.part)

    @property
    def first_of_part(self) -> int:
        """Which of its DP rank's rows the first of `part` is."""
        return self.plan.axis_index("tp", self.rank) * self.part

    def part_of(self, rank: int) -> int:
        """`part` of any rank."""
        return -(-self.by_dp[self.plan.axis_index("dp", rank)] // self.plan.tp_attn)

    def along(self, axis: str) -> tuple[int, ...]:
        """`part` of every rank of this rank's group on an axis, in axis order."""
        return tuple(self.part_of(peer) for peer in self.plan.group(axis, self.rank))


_SOLO_PLAN = Plan()


def solo_rows(num_rows: int) -> StepRows:
    """The rows of a step on the only rank there is."""
    return StepRows(_SOLO_PLAN, 0, (num_rows,))
