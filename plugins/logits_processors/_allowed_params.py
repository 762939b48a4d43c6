"""What a request says of `allowed_token_ids`: `{"ids": [...]}`."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class AllowedTokens:
    """The only tokens that an answer may have; those that end it are no exception."""

    ids: list[int]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids is empty: no token would be left; name one at least")
