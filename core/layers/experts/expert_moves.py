"""Which expert weights travel when experts change places: pure integers, equal on all ranks.

Knows nothing of tensors or of how a placement is found.
"""

from dataclasses import dataclass

from core.parallel.experts import LayerPlacement


@dataclass(frozen=True, slots=True)
class Move:
    """One expert's weights, from a place to a place that is to hold them."""

    source: int  # rank of the ep axis
    source_slot: int  # which of its local experts
    target: int
    slot: int


def expert_moves(old: LayerPlacement, new: LayerPlacement) -> list[Move]:
    """What each place needs that doesn't hold it yet, by target and slot.

    A rank that has a copy copies it itself; else the copies are asked in turn, so that no rank
    sends everything."""
    assert (old.num_logical, old.num_physical, old.ep) == (
        new.num_logical,
        new.num_physical,
        new.ep,
    ), "a move keeps the number of places"
    num_local, moves = old.num_local, []
    asked: dict[int, int] = {}  # by logical expert: copies sent so far
    for physical, logical in enumerate(new.logical_of):
        if old.logical_of[physical] == logical:
            continue
        target, slot = divmod(physical, num_local)
        holders = old.copies(logical)
        at_home = [holder for holder in holders if holder // num_local == target]
        if at_home:
            holder = at_home[0]
        else:
            turn = asked.get(logical, 0)
            asked[logical] = turn + 1
            holder = holders[turn % len(holders)]
        moves.append(Move(*divmod(holder, num_local), target, slot))
    return moves
