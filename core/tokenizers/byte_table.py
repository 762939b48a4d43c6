"""What bytes each token of a vocabulary stands for, where every token has its own.

A text is then its tokens' bytes, one after the other. Knows nothing of where a vocabulary is from.
"""

import codecs
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
# As Python's "replace", but with a U+FFFD for every broken byte, not for every broken sequence:
# what the library's byte fallback does.
EACH_BYTE = "nodeweave_replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


@dataclass(frozen=True, slots=True)
class ByteTable:
    """The bytes of a vocabulary's tokens."""

    of_token: list[bytes]  # by token id
    errors: str  # how bytes that are no UTF-8 become text: an error handler of `codecs`
    stripped_spaces: int  # most spaces that are dropped where a text begins

    def without(self, token_ids: frozenset[int]) -> "ByteTable":
        """The same table in which these tokens have no bytes."""
        kept = [b"" if i in token_ids else piece for i, piece in enumerate(self.of_token)]
        return ByteTable(kept, self.errors, self.stripped_spaces)
