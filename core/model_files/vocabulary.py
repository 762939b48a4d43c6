"""What a tokenizer.json says about its tokens: ids, and which are special. Cheap: nothing is built.

Knows nothing of how text is split. Ids are bounded here, before any table is as long as the
largest of them.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from core.disk.plain_files import decode_json, read_plain
from core.errors import ModelError

MAX_BYTES = 256 << 20  # the largest published ones have some 35 MB
MAX_TOKEN_ID = 1 << 22  # the largest published vocabularies have some 260,000 tokens


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]  # a list where the place is the id


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by their text."""

    ids: dict[str, int]
    added: frozenset[str]  # found in a text before it is split


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokens of a tokenizer.json. Raises ModelError that names the file, and the token whose id
    is out of range."""
    content = decode_json(path, read_plain(path, MAX_BYTES), _Tokenizer)
    vocab, added = content.model.vocab, content.added_tokens or []
    if isinstance(vocab, list):
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    vocab |= {token.content: token.id for token in added}
    for text, token_id in vocab.items():
        if not 0 <= token_id < MAX_TOKEN_ID:
            raise ModelError(
                f"{path}: token {text[:100]!r} has the id {token_id}; allowed: 0 to "
                f"{MAX_TOKEN_ID - 1}"
            )
    return Vocabulary(vocab, frozenset(token.content for token in added))
