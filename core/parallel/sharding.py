"""Who keeps which part of a tensor on one mesh axis: pure integers, the only place that slices.

Layers ask for a `Shard` by meaning (columns, heads, vocabulary) and hand it to their weight
reader; they never see rank or size. Knows nothing of torch, of files, or of model families.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Shard:
    """The `index`-th of `count` equal contiguous parts along `dim`.

    `padded`: `count` need not divide the size; parts are rounded up, and what lies past the end
    of the tensor is zeros. Otherwise a remainder is an error.
    """

    dim: int
    index: int
    count: int
    padded: bool = False

    def local_size(self, size: int) -> int:
        """Entries of every part of a dimension of `size`, zeros included."""
        assert self.padded or size % self.count == 0, f"{self.count} parts do not divide {size}"
        return -(-size // self.count)

    def bounds(self, size: int) -> tuple[int, int]:
        """First and one past the last entry of this part that the tensor really has."""
        part = self.local_size(size)
        return min(self.index * part, size), min((self.index + 1) * part, size)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this part of a tensor of `shape`, zeros included."""
        return (*shape[: self.dim], self.local_size(shape[self.dim]), *shape[self.dim + 1 :])


class AxisPosition(Protocol):
    """Where a rank stands on a mesh axis; every communicator is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class HeadShards:
    """This rank's attention heads: how many, and which rows of the projections they are."""

    num_heads: int
    num_kv_heads: int
    q: Shard
    kv: Shard


@dataclass(frozen=True, slots=True)
class Sharding:
    """The parts that one rank of an axis keeps."""

    rank: int
    size: int

    @classmethod
    def over(cls, axis: AxisPosition) -> "Sharding":
        """The sharding of the rank that holds this communicator."""
        return cls(axis.rank, axis.size)

    def equal(self, dim: int) -> Shard:
        """One equal part for every rank."""
        return Shard(dim, self.rank, self.size)

    def padded(self, dim: int) -> Shard:
        """One part for every rank, of a size that need not divide: a vocabulary."""
        return Shard(dim, self.rank, self.size, padded=True)

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShards:
        """Whole heads along dimension 0 of the q, k and v projections.

        With fewer KV heads than ranks, neighbouring ranks keep the same one: the one that their
        query heads belong to.
        """
        assert not head_problems(num_heads, num_kv_heads, self.size)
        if self.size <= num_kv_heads:
            kv, num_local_kv_heads = self.equal(0), num_kv_heads // self.size
        else:
            kv = Shard(0, self.rank * num_kv_heads // self.size, num_kv_heads)
            num_local_kv_heads = 1
        return HeadShards(num_heads // self.size, num_local_kv_heads, self.equal(0), kv)

    def adds_bias(self) -> bool:
        """Whether this rank adds the bias of a layer whose output is summed over ranks."""
        return self.rank == 0


def head_problems(num_heads: int, num_kv_heads: int, tp: int) -> list[str]:
    """Why attention heads can't be spread over `tp` ranks, one clause each."""
    problems = []
    if num_heads % tp != 0:
        problems.append(f"it does not divide the {num_heads} query heads")
    if num_kv_heads % tp != 0 and tp % num_kv_heads != 0:
        problems.append(f"it neither divides the {num_kv_heads} KV heads nor is a multiple of them")
    return problems


def size_problems(sizes: Mapping[str, int], ranks: int, block: int | None = None) -> list[str]:
    """Why dimensions, by what they are called, can't be cut into equal parts for so many ranks, one
    clause each. `block`: parts must be multiples of it."""
    problems = []
    for name, size in sizes.items():
        if size % ranks != 0:
            problems.append(f"it does not divide the {name} of {size}")
        elif block is not None and ranks > 1 and size // ranks % block != 0:
            problems.append(
                f"it cuts the {name} of {size} into parts of {size // ranks}, and they must be "
                f"multiples of {block}, the block of quantised weights"
            )
    return problems


def cut_problems(
    setting: str, ranks: int, clauses: Callable[[int], list[str]], most: int
) -> list[str]:
    """Why a model can't be cut over `ranks` ranks, one sentence each, naming which numbers up to
    `most` would do.

    `setting` is what the user wrote ("parallel.tp=3"); `clauses` says what is wrong with a number.
    """
    found = clauses(ranks)
    if not found:
        return []
    allowed = ", ".join(str(n) for n in range(1, most + 1) if not clauses(n))
    return [f"{setting}: {clause}; allowed for this model: {allowed}" for clause in found]
