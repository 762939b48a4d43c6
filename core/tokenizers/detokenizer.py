"""Tokens to text, one answer at a time, without ever cutting a character in two.

An answer goes on where its prompt ended: its text is that of prompt and answer together, without
that of the prompt. So the space of a first token is kept, which decoders drop where a text begins.

Knows nothing of requests. Two ways: where every token has bytes of its own (see the module
`byte_table`) they go through Python's incremental UTF-8 decoder; any other decoder is given a short
window of ids twice (with and without the new token), and the difference is given out.
"""

import codecs
from collections.abc import Callable, Sequence

from core.tokenizers.byte_table import EACH_BYTE, REPLACEMENT, ByteTable

MAX_HELD_TOKENS = 64  # of one broken byte sequence; bounds the work per token
CONTEXT_TOKENS = (4, 16, 64)  # of a prompt's end, tried one after the other
MAX_CHARACTER_BYTES = 4  # in UTF-8
Decode = Callable[[Sequence[int]], str]


class ByteDetokenizer:
    """For decoders with a byte table, in which tokens to skip have no bytes."""

    __slots__ = ("_decode", "_opening", "_pending", "_spaces", "_state", "_table")

    def __init__(
        self, table: ByteTable, prompt_ids: Sequence[int] = (), takes_over: bool = False
    ) -> None:
        """`takes_over`: what the prompt's last bytes become is the answer's, also where the answer
        does not complete them."""
        self._table = table.of_token
        decoder = codecs.getincrementaldecoder("utf-8")(table.errors)
        self._decode = decoder.decode
        self._state = decoder.getstate
        self._spaces = self._spaces_to_drop(table.stripped_spaces, prompt_ids)
        unfinished = self._unfinished(prompt_ids, table.errors)
        self._pending = "" if takes_over else unfinished
        self._opening = bool(self._spaces or self._pending)

    @property
    def holding(self) -> bool:
        """Whether a part of a character is held back."""
        return bool(self._state()[0])

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial character is held back. Ids beyond the
        table (a padded vocabulary) have no text."""
        table = self._table
        if len(token_ids) == 1:
            token_id = token_ids[0]
            text = self._decode(table[token_id]) if token_id < len(table) else ""
        else:
            text = self._decode(b"".join([table[i] for i in token_ids if i < len(table)]))
        return self._open(text) if self._opening and text else text

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        text = self._decode(b"", True)
        return self._open(text) if self._opening and text else text

    def _bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if token_id < len(self._table) else b""

    def _spaces_to_drop(self, most: int, prompt_ids: Sequence[int]) -> int:
        """How many spaces a text that began with the prompt still drops."""
        for token_id in prompt_ids if most else ():
            piece = self._bytes(token_id)
            most -= min(len(piece) - len(piece.lstrip(b" ")), most)
            if piece.strip(b" ") or not most:
                return 0
        return most

    def _unfinished(self, prompt_ids: Sequence[int], errors: str) -> str:
        """Take over the part of a character that ends the prompt; returns the prompt's text of it,
        which goes where the answer does not complete it."""
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= MAX_CHARACTER_BYTES:
                break
        self._decode(tail)
        return REPLACEMENT * (len(self._state()[0]) if errors == EACH_BYTE else self.holding)

    def _open(self, text: str) -> str:
        """The first text of an answer, without what decoders drop or the prompt has."""
        if self._pending:
            self._opening = False
            return text.removeprefix(self._pending)
        kept = text.lstrip(" ")
        dropped = min(len(text) - len(kept), self._spaces)
        self._spaces -= dropped
        self._opening = not kept and self._spaces > 0
        return text[dropped:]


class WindowDetokenizer:
    """For any decoder, given as a function from ids to text.

    `_ids[:_done]` is the context: ids whose text was given out, at first the end of the prompt. It
    stays in the window because a decoder may treat the first token of a text differently.
    """

    __slots__ = ("_context_text", "_decode", "_done", "_ids", "_skip", "holding")

    def __init__(
        self,
        decode: Decode,
        skip: frozenset[int],
        prompt_ids: Sequence[int] = (),
        takes_over: bool = False,
    ) -> None:
        self._decode = decode
        self._skip = skip
        self.holding = False  # whether a part of a character is held back
        self._ids: list[int] = []
        self._context_text = ""
        shown = [i for i in prompt_ids[-4 * CONTEXT_TOKENS[-1] :] if i not in skip]
        for num_tokens in CONTEXT_TOKENS if shown else ():
            self._ids = shown[-num_tokens:]
            self._context_text = decode(self._ids)
            if self._context_text and REPLACEMENT not in self._context_text:
                break
        if takes_over:
            known = self._context_text.rstrip(REPLACEMENT)
            self.holding = known != self._context_text
            self._context_text = known
        self._done = len(self._ids)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial character is held back."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            self._ids.append(token_id)
            text = self._decode(self._ids)
            full = len(self._ids) - self._done >= MAX_HELD_TOKENS
            self.holding = text.endswith(REPLACEMENT) and not full
            new = "" if self.holding else self._new(text)
            if not new:
                continue
            pieces.append(new)
            del self._ids[: self._done]
            self._done = len(self._ids)
            self._context_text = self._decode(self._ids)
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        text = self._new(self._decode(self._ids))
        self._ids.clear()
        self._done = 0
        self._context_text = ""
        self.holding = False
        return text

    def _new(self, text: str) -> str:
        """What the window has beyond its context. A decoder may read the context's end otherwise
        once more follows; what was given out is not taken back."""
        return text[common_length(text, self._context_text) :]


def common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if first.startswith(second):
        return len(second)
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
