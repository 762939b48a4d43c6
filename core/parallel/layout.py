"""How a tensor lies over the ranks of one mesh axis. Pure names; bridges convert between them."""

import enum


class Layout(enum.Enum):
    """Where the true value of a tensor is, over the ranks of an axis."""

    REPLICATED = "replicated"  # every rank holds the whole value
    PARTIAL = "partial"  # the value is the sum over ranks
    ROWS = "rows"  # rank i holds the i-th equal part of dimension 0
    COLUMNS = "columns"  # rank i holds the i-th equal part of the last dimension
