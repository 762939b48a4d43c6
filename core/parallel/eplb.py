"""Which ranks should hold copies of which experts, so that all have equally much to do (EPLB).

Busy experts get more copies, copies are packed onto ranks, and where experts lie already little is
moved. Every rank computes the same from the same loads: plain Python on whole numbers and floats,
no random choices. Knows nothing of weights. Source of the idea: DeepSeek's EPLB
(github.com/deepseek-ai/EPLB); hierarchical means that the experts of a routing group stay on one
node, so that fewer rows travel between nodes.

A *bin* is what one rank holds: a list of logical experts, one for each of its slots.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

from core.errors import PlanError
from core.parallel.experts import LayerPlacement

Bin = list[int]

# So much more imbalance (of max / mean) is accepted for not moving experts.
TOLERANCE = 0.03
_SWAPS_PER_BIN = 4


def imbalance(placement: LayerPlacement, loads: Sequence[int]) -> float:
    """Rows of the busiest rank over those of the mean one, copies of an expert sharing its rows;
    1.0 where there are no rows."""
    return _ratio(rank_loads(placement, loads))


def rank_loads(placement: LayerPlacement, loads: Sequence[int]) -> list[float]:
    """Rows of every rank of the ep axis, by the rows of each logical expert."""
    share = _shares(loads, Counter(placement.logical_of))
    return [sum(share[e] for e in placement.local(rank)) for rank in range(placement.ep)]


def nodes_of_groups(
    strategy: str, *, num_experts: int, num_groups: int, ep: int, nodes: int
) -> int:
    """Over how many nodes groups of experts are spread whole; 1: any expert may be anywhere.

    `strategy` as in parallel.eplb.strategy. Raises PlanError where it can't be followed.
    """
    if strategy == "global":
        return 1
    fits = num_groups % nodes == 0 and ep % nodes == 0 and num_experts % num_groups == 0
    if strategy == "hierarchical" and not fits:
        raise PlanError(
            [
                f"parallel.eplb.strategy='hierarchical': {num_groups} groups of experts and "
                f"parallel.ep={ep} ranks can't be divided by launch.nnodes={nodes}; allowed here: "
                "auto, global"
            ]
        )
    return nodes if fits else 1


def balanced_placement(
    loads: Sequence[int],
    old: LayerPlacement,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> LayerPlacement:
    """A placement for the rows that each logical expert got, of as many physical experts and ranks
    as `old` has; it differs little from `old`, and is `old` where that is as good.

    With `num_nodes` from `nodes_of_groups` above 1, each node gets whole groups of experts: groups
    are contiguous ranges of equally many, nodes contiguous ranges of ranks.
    """
    assert len(loads) == old.num_logical, (len(loads), old.num_logical)
    assert old.ep % num_nodes == 0
    old_bins = [list(old.local(rank)) for rank in range(old.ep)]
    per_node = old.ep // num_nodes
    old_nodes = [old_bins[i : i + per_node] for i in range(0, old.ep, per_node)]
    bins: list[Bin] = []
    for experts, mine in zip(
        _experts_of_nodes(loads, old_nodes, num_groups), old_nodes, strict=True
    ):
        bins += _fill_node(experts, loads, mine)
    new = LayerPlacement(old.num_logical, old.ep, tuple(e for b in bins for e in b))
    return new if _is_worth_moving(old, new, loads, old_nodes, num_groups) else old


def _is_worth_moving(
    old: LayerPlacement,
    new: LayerPlacement,
    loads: Sequence[int],
    old_nodes: Sequence[Sequence[Bin]],
    num_groups: int,
) -> bool:
    if len(old_nodes) > 1 and _groups_of_nodes(old_nodes, old.num_logical, num_groups) is None:
        return True  # groups are not whole on nodes yet
    return imbalance(old, loads) > imbalance(new, loads) + TOLERANCE


def _experts_of_nodes(
    loads: Sequence[int], old_nodes: Sequence[Sequence[Bin]], num_groups: int
) -> list[list[int]]:
    """The logical experts of every node."""
    num_nodes, num_experts = len(old_nodes), len(loads)
    if num_nodes == 1:
        return [list(range(num_experts))]
    size = num_experts // num_groups
    weights = {g: sum(loads[g * size : (g + 1) * size]) for g in range(num_groups)}
    fresh = _pack(weights, dict.fromkeys(range(num_groups), 1), num_nodes)
    old = _groups_of_nodes(old_nodes, num_experts, num_groups)
    chosen = fresh
    if old is not None:
        keeps = _bins_ratio(old, weights) <= _bins_ratio(fresh, weights) + TOLERANCE
        chosen = old if keeps else _matched(fresh, old)
    return [[e for g in groups for e in range(g * size, (g + 1) * size)] for groups in chosen]


def _groups_of_nodes(
    nodes: Sequence[Sequence[Bin]], num_experts: int, num_groups: int
) -> list[Bin] | None:
    """Which groups each node holds, or None where one is not whole on one node."""
    size = num_experts // num_groups
    found = [sorted({expert // size for held in node for expert in held}) for node in nodes]
    whole = all(len(groups) == num_groups // len(nodes) for groups in found)
    return found if whole else None


def _fill_node(experts: Sequence[int], loads: Sequence[int], old_bins: Sequence[Bin]) -> list[Bin]:
    """What the ranks of one node hold of `experts`: the best found, or nearly as good a one that
    has more in common with `old_bins`."""
    num_bins, capacity = len(old_bins), len(old_bins[0])
    copies = _replicate(experts, loads, num_bins * capacity, num_bins)
    shares = _shares(loads, copies)
    fresh = _matched(_pack(shares, copies, num_bins), old_bins)
    patched = _patched(old_bins, shares, copies)
    chosen = fresh
    if patched is not None:
        nearly = _bins_ratio(fresh, shares) + TOLERANCE
        chosen = patched if _bins_ratio(patched, shares) <= nearly else fresh
    return [_in_old_slots(new, old) for new, old in zip(chosen, old_bins, strict=True)]


def _replicate(
    experts: Sequence[int], loads: Sequence[int], num_slots: int, num_bins: int
) -> Counter[int]:
    """Copies of each expert: each further slot goes to the expert with most rows for a copy, which
    makes the largest such number as small as it can be. Not more copies than bins, unless there
    are more slots than that allows."""
    assert num_slots >= len(experts), (num_slots, len(experts))
    most = max(num_bins, -(-num_slots // len(experts)))
    copies = Counter(dict.fromkeys(experts, 1))
    heap = [(-float(loads[expert]), expert) for expert in experts]
    heapq.heapify(heap)
    for _ in range(num_slots - len(experts)):
        while True:
            _, expert = heapq.heappop(heap)
            if copies[expert] < most:
                break
        copies[expert] += 1
        heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return copies


def _shares(loads: Sequence[int], copies: Counter[int]) -> dict[int, float]:
    """Rows of one copy of each expert."""
    return {expert: loads[expert] / count for expert, count in copies.items()}


def _pack(shares: Mapping[int, float], copies: Mapping[int, int], num_bins: int) -> list[Bin]:
    """Equally many copies into every bin: largest first, into the emptiest bin that has room and
    none of that expert; then copies are exchanged while that helps."""
    capacity = sum(copies.values()) // num_bins
    bins: list[Bin] = [[] for _ in range(num_bins)]
    sums = [0.0] * num_bins
    for expert in sorted(copies, key=lambda e: (-shares[e], e)):
        for _ in range(copies[expert]):
            _put(expert, bins, sums, capacity, shares)
    _exchange_while_better(bins, sums, shares)
    return bins


def _put(
    expert: int,
    bins: list[Bin],
    sums: list[float],
    capacity: int,
    shares: Mapping[int, float],
) -> None:
    """One more copy into the best bin."""
    room = [b for b in range(len(bins)) if len(bins[b]) < capacity]
    fitting = [b for b in room if expert not in bins[b]]
    if fitting:
        target = min(fitting, key=lambda b: (sums[b], b))
    else:  # all bins with room have one: a full bin without one gives a copy of its own for it
        target = min(room, key=lambda b: (sums[b], b))
        exchanges = (
            (sums[b], b, other)
            for b in range(len(bins))
            if expert not in bins[b]
            for other in bins[b]
            if other not in bins[target]
        )
        found = min(exchanges, default=None)
        if found is not None:
            _, giver, other = found
            bins[giver][bins[giver].index(other)] = expert
            sums[giver] += shares[expert] - shares[other]
            expert = other
    bins[target].append(expert)
    sums[target] += shares[expert]


def _exchange_while_better(bins: list[Bin], sums: list[float], shares: Mapping[int, float]) -> None:
    """Exchange copies between the fullest bin and another while that lowers it, some times."""
    for _ in range(_SWAPS_PER_BIN * len(bins)):
        full = max(range(len(bins)), key=lambda b: (sums[b], -b))
        if sums[full] * len(bins) <= sum(sums) * 1.005:
            return
        for other in sorted(range(len(bins)), key=lambda b: (sums[b], b)):
            swap = _best_swap(bins[full], bins[other], sums[full] - sums[other], shares)
            if swap is not None:
                break
        else:
            return
        out, back = swap
        difference = shares[bins[full][out]] - shares[bins[other][back]]
        bins[full][out], bins[other][back] = bins[other][back], bins[full][out]
        sums[full] -= difference
        sums[other] += difference


def _best_swap(
    full: Bin, other: Bin, gap: float, shares: Mapping[int, float]
) -> tuple[int, int] | None:
    """Indices of the copies whose exchange brings two bins closest, or None where none helps."""
    best, least = None, gap * 0.999
    for out, mine in enumerate(full):
        if mine in other:
            continue
        for back, theirs in enumerate(other):
            left = abs(gap - 2 * (shares[mine] - shares[theirs]))
            if left < least and theirs not in full:
                best, least = (out, back), left
    return best


def _patched(
    old_bins: Sequence[Bin], shares: Mapping[int, float], copies: Counter[int]
) -> list[Bin] | None:
    """The old bins with as few copies changed as the new numbers of copies need, then exchanged
    while that helps; None where they held other experts."""
    capacity = len(old_bins[0])
    # Two copies on one rank are of no use while there is another expert to hold.
    bins = [list(dict.fromkeys(b)) if capacity <= len(copies) else list(b) for b in old_bins]
    held = Counter(expert for b in bins for expert in b)
    if not held.keys() <= copies.keys():
        return None
    sums = [sum(shares[expert] for expert in held) for held in bins]
    for expert in sorted(held):
        for _ in range(held[expert] - copies[expert]):
            source = max(
                (b for b in range(len(bins)) if expert in bins[b]),
                key=lambda b: (bins[b].count(expert), sums[b], -b),
            )
            bins[source].remove(expert)
            sums[source] -= shares[expert]
    for expert in sorted(copies, key=lambda e: (-shares[e], e)):
        for _ in range(copies[expert] - held[expert]):
            _put(expert, bins, sums, capacity, shares)
    _exchange_while_better(bins, sums, shares)
    return bins


def _matched(new: Sequence[Bin], old: Sequence[Bin]) -> list[Bin]:
    """The new bins in the order in which they have most in common with the old ones."""
    common = [[(Counter(a) & Counter(b)).total() for b in old] for a in new]
    pairs = sorted(
        ((i, j) for i in range(len(new)) for j in range(len(old))),
        key=lambda pair: (-common[pair[0]][pair[1]], pair),
    )
    order: dict[int, int] = {}
    used: set[int] = set()
    for i, j in pairs:
        if j not in order and i not in used:
            order[j] = i
            used.add(i)
    return [list(new[order[j]]) for j in range(len(old))]


def _in_old_slots(new: Bin, old: Bin) -> Bin:
    """The experts of `new`, those of `old` in their old slots."""
    coming = Counter(new)
    slots: list[int | None] = []
    for expert in old:
        stays = coming[expert] > 0
        coming[expert] -= stays
        slots.append(expert if stays else None)
    rest = coming.elements()
    return [next(rest) if expert is None else expert for expert in slots]


def _bins_ratio(bins: Sequence[Bin], shares: Mapping[int, float]) -> float:
    return _ratio([sum(shares[expert] for expert in held) for held in bins])


def _ratio(sums: Sequence[float]) -> float:
    total = sum(sums)
    return max(sums) * len(sums) / total if total > 0 else 1.0
