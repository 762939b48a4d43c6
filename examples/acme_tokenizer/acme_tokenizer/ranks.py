"""Byte-pair encoding by ranks: of two neighbours those whose join has the lowest id are joined."""

import base64
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.disk.plain_files import read_plain
from core.errors import ModelError
from core.interfaces.tokenizer import Tokenizer
from core.tokenizers.byte_table_tokenizer import ByteTableTokenizer
from core.tokenizers.chat_templates import ChatTemplates, read_optional

MAX_BYTES = 64 << 20
MAX_TOKEN_ID = 1 << 22
_WORD = re.compile(r"\s?\S+|\s+")


def load(folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
    """core.interfaces.tokenizer.LoadTokenizer."""
    ranks = _read_ranks(folder / "tiktoken.model")
    special = _read_special(folder / "tokenizer_config.json")
    return RankTokenizer(ranks, special, eos_ids, ChatTemplates.from_folder(folder))


class RankTokenizer(ByteTableTokenizer):
    """Implements core.interfaces.tokenizer.Tokenizer."""

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special: Mapping[str, int],
        eos_ids: Sequence[int],
        templates: ChatTemplates,
    ) -> None:
        of_token = {rank: piece for piece, rank in ranks.items()}
        of_token |= {token_id: text.encode() for text, token_id in special.items()}
        pieces = [of_token.get(i, b"") for i in range(max(of_token, default=-1) + 1)]
        super().__init__(pieces, special_ids=special.values(), eos_ids=eos_ids, templates=templates)
        self._ranks = ranks
        self._special = special
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first)})") if special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        token_ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._special:
                token_ids.append(self._special[part])
            else:
                for word in _WORD.findall(part):
                    token_ids += self._encode_word(word.encode())
        return token_ids

    def _encode_word(self, word: bytes) -> list[int]:
        pieces = [word[i : i + 1] for i in range(len(word))]
        while len(pieces) > 1:
            joins = [self._ranks.get(a + b) for a, b in itertools.pairwise(pieces)]
            known = [rank for rank in joins if rank is not None]
            if not known:
                break
            place = joins.index(min(known))
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        return [self._ranks[piece] for piece in pieces]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_plain(path, MAX_BYTES).splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise ModelError(
                f"{path}, line {number}: needed: a token in base64 and its id"
            ) from error
    _check_ids(path, list(ranks.values()))
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ModelError(f"{path} has no token for the byte {missing[0]}; it was cut off")
    return ranks


def _read_special(path: Path) -> dict[str, int]:
    """Text -> id of the special tokens: {"256": {"content": "<|end|>"}, ...}."""
    found = read_optional(path).get("added_tokens_decoder", {})
    try:
        special = {str(entry["content"]): int(token_id) for token_id, entry in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: added_tokens_decoder must map ids to objects with content"
        ) from error
    _check_ids(path, list(special.values()))
    return special


def _check_ids(path: Path, token_ids: Sequence[int]) -> None:
    wrong = [i for i in token_ids if not 0 <= i < MAX_TOKEN_ID]
    if wrong:
        raise ModelError(f"{path} has the token id {wrong[0]}; allowed: 0 to {MAX_TOKEN_ID - 1}")
