"""Tokens to text, one answer at a time, without ever cutting a character in two.

Knows nothing of requests. Two ways: tokenizers whose decoder is plain byte-level (GPT-2, Llama 3,
Qwen, DeepSeek) are a table of bytes and Python's incremental UTF-8 decoder, which replaces broken
sequences as the Rust decoder does; every other tokenizer decodes a short window of ids twice
(with and without the new token) and gives out the difference.
"""

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 64  # of one broken byte sequence; bounds the work per token
Decode = Callable[[Sequence[int]], str]


class ByteDetokenizer:
    """For byte-level decoders. `table[id]` is the token's bytes, empty for those to skip."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial character is held back. Ids beyond the
        table (a padded vocabulary) have no text."""
        table = self._table
        if len(token_ids) == 1:
            token_id = token_ids[0]
            return self._decode(table[token_id]) if token_id < len(table) else ""
        return self._decode(b"".join([table[i] for i in token_ids if i < len(table)]))

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any decoder, given as a function from ids to text.

    `_ids[:_done]` is the context: ids whose text was given out. It stays in the window because a
    decoder may treat the first token of a text differently (dropping its leading space).
    """

    __slots__ = ("_context_text", "_decode", "_done", "_ids", "_skip")

    def __init__(self, decode: Decode, skip: frozenset[int]) -> None:
        self._decode = decode
        self._skip = skip
        self._ids: list[int] = []
        self._done = 0
        self._context_text = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial character is held back."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            self._ids.append(token_id)
            text = self._decode(self._ids)
            held = text.endswith(REPLACEMENT) and len(self._ids) - self._done < MAX_HELD_TOKENS
            if held or len(text) <= len(self._context_text):
                continue
            pieces.append(text[len(self._context_text) :])
            del self._ids[: self._done]
            self._done = len(self._ids)
            self._context_text = self._decode(self._ids)
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        text = self._decode(self._ids)[len(self._context_text) :]
        self._ids.clear()
        self._done = 0
        self._context_text = ""
        return text
