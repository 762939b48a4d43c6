"""A model's tokenizer from a folder in Hugging Face form. Knows nothing of requests or sockets.

Reads tokenizer.json, tokenizer_config.json and, where present, special_tokens_map.json and
generation_config.json. Uses the `tokenizers` library directly: transformers takes seconds to
import.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import ModelError
from core.interfaces.tokenizer import IncrementalDetokenizer, Tokenizer
from core.model_files.tokenizer_settings import check_settings
from core.tokenizers.byte_table import REPLACEMENT
from core.tokenizers.chat_templates import (
    ChatTemplates,
    read_chat_templates,
    read_optional,
    special_tokens_of,
)
from core.tokenizers.detokenizer import ByteDetokenizer, WindowDetokenizer
from plugins.tokenizers._hf.byte_table import byte_of_piece, byte_table
from plugins.tokenizers._hf.panics import building, without_panics
from plugins.tokenizers._hf.special_tokens import apply_settings


class HfTokenizer:
    """Implements core.interfaces.tokenizer.Tokenizer."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        chat_templates: dict[str, str],
        eos_ids: Iterable[int] = (),
    ) -> None:
        """`chat_templates` by name: "default", and "tool_use" where the checkpoint has one."""
        self._backend = backend
        self._backend.no_truncation()  # tokenizer.json may ask for it; we refuse, never cut
        self._backend.no_padding()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = _eos_ids(backend, special_tokens, eos_ids)
        self._templates = ChatTemplates(chat_templates, special_tokens)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        table = byte_table(backend)
        self._byte_table = table
        self._has_byte_pieces = "ByteFallback" in str(backend.decoder)
        self._text_byte_table = table and table.without(self._special_ids)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.max_token_characters = max(map(len, vocabulary), default=1)
        # May lie beyond `vocab_size`, which counts: ids can have gaps.
        self.max_token_id = max(vocabulary.values(), default=0)

    @classmethod
    def from_folder(cls, folder: str | Path, eos_ids: Iterable[int] = ()) -> "HfTokenizer":
        """Load a folder. `eos_ids` come first where the caller knows them (ModelFiles).

        Raises ModelError naming the file that is missing or broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"there is no tokenizer: {path} does not exist; convert the checkpoint's tokenizer "
                "to tokenizer.json (transformers' save_pretrained writes it)"
            )
        with building(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
        config = read_optional(folder / "tokenizer_config.json")
        check_settings(folder / "tokenizer_config.json", config)
        generation = read_optional(folder / "generation_config.json")
        found = list(eos_ids) or _as_list(generation.get("eos_token_id"))
        tokens_map = read_optional(folder / "special_tokens_map.json")
        special_tokens = special_tokens_of(config, tokens_map)
        chat_templates = read_chat_templates(folder, config)
        with building(path):
            apply_settings(backend, config, special_tokens)
            return cls(
                backend,
                special_tokens=special_tokens,
                chat_templates=chat_templates,
                eos_ids=found,
            )

    @without_panics
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # Unlike `encode` this lets other threads run meanwhile, and makes no offsets.
        [found] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    @without_panics
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_open(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Text that goes on, special tokens included, and whether the last tokens began a character
        that is left out: a detokenizer with `takes_over` gives it."""
        if self._byte_table is not None:
            detokenizer = ByteDetokenizer(self._byte_table)
            return detokenizer.add(token_ids), detokenizer.holding
        whole = self.decode(token_ids, skip_special_tokens=False)
        text = whole.rstrip(REPLACEMENT)
        return text, text != whole

    @without_panics
    def offsets(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Where each token of `encode` begins in the text, in characters, whatever the tokenizer
        made of it. A character of several tokens begins with its first; tokens beside the text have
        the place where the one before them ends."""
        [found] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        offsets: list[int] = []
        last_end = 0
        for begin, end in found.offsets:
            is_inside = begin < last_end  # a character that a token before it began
            offsets.append(last_end if begin == end else begin + is_inside)
            last_end = max(end, last_end)
        return offsets

    def token_text(self, token_id: int) -> str:
        """The token alone as text, as logprobs report it; "" beyond the vocabulary."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @without_panics
    def token_bytes(self, token_id: int) -> bytes:
        if self._byte_table is not None:
            pieces = self._byte_table.of_token
            return pieces[token_id] if token_id < len(pieces) else b""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._has_byte_pieces and (byte := byte_of_piece(piece)) is not None:
            return byte
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        # Decoders drop the space before a text's first word; alone, the token keeps it.
        if piece.startswith("▁") and not text.startswith(" ") and REPLACEMENT not in text:
            text = " " + text
        return text.encode()

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
        table = self._text_byte_table if skip_special_tokens else self._byte_table
        if table is not None:
            return ByteDetokenizer(table, prompt_ids, takes_over)
        skip = self._special_ids if skip_special_tokens else frozenset()
        return WindowDetokenizer(self._decode_window, skip, prompt_ids, takes_over)

    @without_panics
    def _decode_window(self, token_ids: Sequence[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text


def load(folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
    """core.interfaces.tokenizer.LoadTokenizer."""
    return HfTokenizer.from_folder(folder, eos_ids)


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _eos_ids(
    backend: tokenizers.Tokenizer, special_tokens: dict[str, str], eos_ids: Iterable[int]
) -> tuple[int, ...]:
    found = list(dict.fromkeys(eos_ids))
    text = special_tokens.get("eos_token")
    token_id = backend.token_to_id(text) if text is not None else None
    if token_id is not None and token_id not in found:
        found.append(token_id)
    return tuple(found)
