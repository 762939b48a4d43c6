"""The bytes of a vocabulary's tokens, where a decoder of the tokenizers library gives each its own.

So do byte-level decoders (GPT-2, Llama 3, Qwen, DeepSeek) and SentencePiece's with byte fallback
(Llama 2, Mistral, Gemma). Others (WordPiece, Metaspace) look at a token's neighbours and have no
such table.
"""

import json
import string
from typing import Any

import tokenizers

from core.errors import ModelError
from core.tokenizers.byte_table import EACH_BYTE, ByteTable

MAX_TOKEN_ID = (1 << 22) - 1  # sixteen times the largest vocabulary published


def byte_table(backend: tokenizers.Tokenizer) -> ByteTable | None:
    """The table of a tokenizer; None where its decoder has none.

    Raises ModelError for a token id that no vocabulary reaches: the table is as long as it.
    """
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    types = [part.get("type") for part in parts]
    vocab = backend.get_vocab(with_added_tokens=True)
    if "ByteLevel" in types and set(types) <= {"ByteLevel", "Fuse"}:
        return ByteTable(_pieces(vocab, _ByteLevel()), "replace", 0)
    if types[:3] == ["Replace", "ByteFallback", "Fuse"] and len(types) <= 4:
        old, new = parts[0]["pattern"].get("String"), parts[0]["content"]
        stripped = _stripped_spaces(parts[3]) if len(types) == 4 else 0
        if old and stripped is not None:
            return ByteTable(_pieces(vocab, _Fallback(old, new)), EACH_BYTE, stripped)
    return None


def _stripped_spaces(part: dict[str, Any]) -> int | None:
    """Of a Strip that takes spaces from the left; None for any other part."""
    if part.get("type") != "Strip" or part["content"] != " " or part["stop"] != 0:
        return None
    return int(part["start"])


def _pieces(vocab: dict[str, int], bytes_of: "_ByteLevel | _Fallback") -> list[bytes]:
    largest = max(vocab.values(), default=-1)
    if largest > MAX_TOKEN_ID:
        raise ModelError(
            f"the tokenizer has a token with the id {largest}; allowed: 0 to {MAX_TOKEN_ID}; "
            "convert the checkpoint's tokenizer again"
        )
    table = [b""] * (largest + 1)
    for piece, token_id in vocab.items():
        table[token_id] = bytes_of(piece)
    return table


class _ByteLevel:
    """Each character of a piece stands for one byte (the GPT-2 alphabet); a piece with other
    characters is its own UTF-8, as the decoder has it."""

    def __init__(self) -> None:
        self._byte_of = _gpt2_alphabet()

    def __call__(self, piece: str) -> bytes:
        try:
            return bytes([self._byte_of[character] for character in piece])
        except KeyError:
            return piece.encode()


class _Fallback:
    """A piece with SentencePiece's spaces replaced; <0x0A> is one byte."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, piece: str) -> bytes:
        piece = piece.replace(self._old, self._new)
        byte = byte_of_piece(piece)
        return piece.encode() if byte is None else byte


def byte_of_piece(piece: str) -> bytes | None:
    """The byte that a piece like <0x0A> stands for; None for any other piece."""
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    if not is_byte or not set(piece[3:5]) <= set(string.hexdigits):
        return None
    return bytes([int(piece[3:5], 16)])


def _gpt2_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
