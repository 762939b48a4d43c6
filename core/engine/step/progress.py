"""How many pieces of its steps a rank has done, for those who watch whether it moves."""


class Progress:
    """Counted by what computes, read from any thread."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces = 0  # layers whose attention was computed, parts of prompt logprobs
