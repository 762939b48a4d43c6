"""Few of many cases, such that each value of their parameters still occurs, or each pair of values
that some case has still does.

What is wrong with a kernel nearly always shows with one value of one parameter or with two together
(Kuhn, Wallace and Gallo, "Software Fault Interactions and Implications for Software Testing", IEEE
TSE 30(6), 2004), and pairs need a small part of a full product.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def covering(rows: Sequence[Sequence[Hashable]], together: int = 2) -> set[int]:
    """Indices of rows that hold whatever values of `together` columns any row holds.

    Rows have the same columns. Greedy: of the rows that add most, the first of those whose values
    were taken least, so that values come about as often, and the same rows give the same answer in
    every process.
    """
    if not rows:
        return set()
    together = min(together, len(rows[0]))
    values = [list(enumerate(row)) for row in rows]
    groups = [set(combinations(row, together)) for row in values]
    left = set().union(*groups)
    taken: Counter[tuple[int, Hashable]] = Counter()
    chosen = set()
    while left:
        added = [len(of_row & left) for of_row in groups]
        most = max(added)
        best = min(
            (index for index, number in enumerate(added) if number == most),
            key=lambda index: sum(taken[value] for value in values[index]),
        )
        chosen.add(best)
        left -= groups[best]
        taken.update(values[best])
    return chosen
