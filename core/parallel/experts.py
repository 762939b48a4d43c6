"""Which rank holds which expert: pure integers. Knows nothing of tensors or of loads.

A *logical* expert is one of the model's; a *physical* expert is a copy of it with a place: the
ranks of the ep axis hold equal, contiguous ranges of physical ids. Redundant experts are physical
experts beyond the logical ones. Source of the terms: DeepSeek's EPLB.
"""

from dataclasses import dataclass

from core.errors import PlanError


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """The physical experts of one layer: entry p is the logical expert that p is a copy of."""

    num_logical: int
    ep: int
    logical_of: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.logical_of) % self.ep == 0, "ranks hold equally many physical experts"
        assert set(self.logical_of) == set(range(self.num_logical)), "an expert has no place"

    @property
    def num_physical(self) -> int:
        return len(self.logical_of)

    @property
    def num_local(self) -> int:
        """Physical experts of each rank of the ep axis."""
        return self.num_physical // self.ep

    def local(self, ep_index: int) -> tuple[int, ...]:
        """The logical experts that a rank of the ep axis holds, in the order of physical ids."""
        first = ep_index * self.num_local
        return self.logical_of[first : first + self.num_local]

    def copies(self, logical: int) -> tuple[int, ...]:
        """Physical ids of a logical expert, ascending."""
        return tuple(p for p, owner in enumerate(self.logical_of) if owner == logical)


def expert_problems(num_experts: int, ep: int, redundant: int) -> list[str]:
    """Why experts can't be spread over `ep` ranks, one sentence each, naming what would do."""
    total = num_experts + redundant
    if total % ep == 0:
        return []
    below = redundant - total % ep
    above = redundant + ep - total % ep
    allowed = " or ".join(str(n) for n in (below, above) if n >= 0)
    return [
        f"parallel.redundant_experts={redundant}: {num_experts} experts and {redundant} redundant "
        f"ones can't be spread evenly over parallel.ep={ep} ranks; allowed next to it: {allowed}"
    ]


def default_placement(num_experts: int, ep: int, redundant: int) -> LayerPlacement:
    """Logical experts in order; redundant copies are of experts 0, 1, 2... in turn, spread so that
    no rank holds two copies of one expert where that can be had.

    Raises PlanError where they can't be spread evenly.
    """
    problems = expert_problems(num_experts, ep, redundant)
    if problems:
        raise PlanError(problems)
    num_local = (num_experts + redundant) // ep
    order = [*range(num_experts), *(index % num_experts for index in range(redundant))]
    # The copies of one expert are `num_experts` apart in `order`; dealing out contiguous ranges
    # puts them on different ranks unless one rank holds more than all experts.
    assert num_local * ep == len(order)
    return LayerPlacement(num_experts, ep, tuple(order))
