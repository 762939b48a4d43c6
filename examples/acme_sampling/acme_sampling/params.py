"""What a request may ask for."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class NgramParams:
    """`{"size": 3}`. What __post_init__ raises is the client's 400."""

    size: int  # tokens

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 64:
            raise ValueError(f"size={self.size} is out of range; allowed: 1 to 64")
