"""A parallelism plan: frozen integers, no torch, no process groups.

Two views of the same ranks: dense `pp x dp x tp` and sparse `pp x ep x tp_expert`, with equal
products. Two more axes lie across them: "dense", the ranks that share one dense MLP, and "world",
all ranks of a pipeline stage. Ranks are numbered with the last axis fastest, so the ranks of one
tensor-parallel group are neighbours.
"""

from dataclasses import dataclass

from core.errors import PlanError

AXES = ("pp", "dp", "tp", "ep", "tp_expert", "dense", "world")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of every mesh axis, for one replica. Raises PlanError where they don't fit."""

    pp: int = 1  # pipeline stages
    dp: int = 1  # data-parallel attention
    tp_attn: int = 1  # tensor-parallel attention and dense layers: the axis "tp"
    ep: int = 1  # expert parallelism
    tp_expert: int = 1  # tensor parallelism inside one expert
    tp_dense: int | None = None  # neighbouring ranks that share a dense MLP; None: tp_attn
    dp_lm_head: bool = False  # the output head works on each dp rank's own rows
    redundant_experts: int = 0  # extra copies of busy experts, over all ranks
    # Ranks that share experts have the same rows, and add up what their experts make of them: no
    # row travels. Only without data-parallel attention.
    replicated_rows: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={size}: a mesh axis has at least 1 rank"
            for name, size in (
                ("pp", self.pp),
                ("dp", self.dp),
                ("tp_attn", self.tp_attn),
                ("ep", self.ep),
                ("tp_expert", self.tp_expert),
            )
            if size < 1
        ]
        if self.replicated_rows and self.dp > 1:
            problems.append(f"replicated_rows=True: the dp={self.dp} ranks have rows of their own")
        if self.redundant_experts < 0:
            problems.append(f"redundant_experts={self.redundant_experts}: must be at least 0")
        dense, sparse = self.dp * self.tp_attn, self.ep * self.tp_expert
        if dense != sparse:
            problems.append(
                f"the dense view dp x tp_attn = {self.dp} x {self.tp_attn} = {dense} and the "
                f"sparse view ep x tp_expert = {self.ep} x {self.tp_expert} = {sparse} "
                "must cover the same ranks"
            )
        elif self.tp_dense is not None and (self.tp_dense < 1 or dense % self.tp_dense != 0):
            problems.append(f"tp_dense={self.tp_dense} must divide the {dense} ranks of a stage")
        if problems:
            raise PlanError(problems)

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.dp * self.tp_attn

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: the axis "world"."""
        return self.dp * self.tp_attn

    def cuts_rows(self, *, has_experts: bool) -> bool:
        """Whether the rows of a step are cut over "tp" between the blocks of a layer: where other
        ranks' rows come in anyway, because experts or dense MLPs are shared with them."""
        shares_experts = has_experts and (self.dp > 1 or self.ep > 1) and not self.replicated_rows
        return shares_experts or self.axis_size("dense") > self.tp_attn

    def axis_size(self, axis: str) -> int:
        """Ranks along a mesh axis, one of `AXES`; "tp" is that of attention and dense layers."""
        return self._size_and_stride(axis)[0]

    def axis_index(self, axis: str, rank: int) -> int:
        """The position of `rank` along a mesh axis."""
        assert 0 <= rank < self.world_size, rank
        size, stride = self._size_and_stride(axis)
        return rank // stride % size

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of `rank` along every axis. (pp, dp, tp) name it, as do (pp, ep,
        tp_expert)."""
        return {axis: self.axis_index(axis, rank) for axis in AXES}

    def group(self, axis: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` along `axis` only, itself included, in axis order."""
        size, stride = self._size_and_stride(axis)
        first = rank - self.axis_index(axis, rank) * stride
        return [first + index * stride for index in range(size)]

    def groups(self, axis: str) -> list[list[int]]:
        """Every group of an axis, ordered by first rank; each rank is in exactly one."""
        return [
            self.group(axis, rank)
            for rank in range(self.world_size)
            if self.axis_index(axis, rank) == 0
        ]

    def _size_and_stride(self, axis: str) -> tuple[int, int]:
        """Ranks along an axis, and by how much the rank grows from one to the next."""
        return {
            "pp": (self.pp, self.dp * self.tp_attn),
            "dp": (self.dp, self.tp_attn),
            "tp": (self.tp_attn, 1),
            "ep": (self.ep, self.tp_expert),
            "tp_expert": (self.tp_expert, 1),
            "dense": (self.tp_attn if self.tp_dense is None else self.tp_dense, 1),
            "world": (self.stage_size, 1),
        }[axis]
