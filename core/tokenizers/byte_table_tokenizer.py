"""A tokenizer whose tokens each stand for bytes of their own: all but how text is cut into tokens.

For tokenizers of other libraries: who subclasses it writes `encode`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from core.interfaces.tokenizer import IncrementalDetokenizer
from core.tokenizers.byte_table import ByteTable
from core.tokenizers.chat_templates import ChatTemplates
from core.tokenizers.detokenizer import ByteDetokenizer


class ByteTableTokenizer(ABC):
    """Implements core.interfaces.tokenizer.Tokenizer, but for `encode`.

    The bytes of the tokens that `encode` gives, without special ones that it adds, are those of the
    text.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        special_ids: Iterable[int] = (),
        eos_ids: Sequence[int] = (),
        templates: ChatTemplates,
    ) -> None:
        """`pieces`: bytes by token id; a special token's are those that it is written as, and left
        out of answers."""
        special = frozenset(special_ids)
        table = ByteTable(list(pieces), "replace", 0)
        self._pieces = table.of_token
        self._special_ids = special
        self._table, self._text_table = table, table.without(special)
        self._templates = templates
        self.vocab_size = len(pieces)
        self.max_token_id = len(pieces) - 1
        self.eos_ids = tuple(eos_ids)
        self.max_token_characters = max(map(len, pieces), default=1)

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        table = self._text_table if skip_special_tokens else self._table
        detokenizer = ByteDetokenizer(table)
        return detokenizer.add(token_ids) + detokenizer.finish()

    def decode_open(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        detokenizer = ByteDetokenizer(self._table)
        return detokenizer.add(token_ids), detokenizer.holding

    def offsets(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        token_ids = self.encode(text, add_special_tokens=add_special_tokens)
        inner = self.encode(text, add_special_tokens=False)
        first = next(i for i in range(len(token_ids) + 1) if token_ids[i : i + len(inner)] == inner)
        offsets = [0] * first
        num_characters = 0
        for token_id in inner:
            offsets.append(num_characters)
            # A character counts from its first byte on.
            num_characters += sum(byte & 0xC0 != 0x80 for byte in self.token_bytes(token_id))
        return offsets + [num_characters] * (len(token_ids) - len(offsets))

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        return self._templates.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def check_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> int:
        return self._templates.check(messages, tools)

    def compile_templates(self) -> None:
        self._templates.compile()

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        takes_over: bool = False,
    ) -> IncrementalDetokenizer:
        table = self._text_table if skip_special_tokens else self._table
        return ByteDetokenizer(table, prompt_ids, takes_over)
