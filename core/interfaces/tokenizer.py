"""What turns text into token ids and back, and how one is found for a model.

A *kind* of tokenizers says which folders are its own and loads one; a tokenizer is one model's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class IncrementalDetokenizer(Protocol):
    """Text of one answer, token by token: that of prompt and answer without the prompt's."""

    @property
    def holding(self) -> bool:
        """Whether a part of a character is held back."""
        ...

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial UTF-8 character is held back."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back, for one model. Built twice: in the processes that render and tokenize,
    and where answers are written, which only asks for text of ids."""

    vocab_size: int
    max_token_id: int  # may lie beyond `vocab_size`, which counts: ids can have gaps
    eos_ids: tuple[int, ...]
    max_token_characters: int  # of the longest token: bounds a text's token count from below

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def decode_open(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Text that goes on, special tokens included, and whether the last tokens began a character
        that is left out: a detokenizer with `takes_over` gives it."""
        ...

    def offsets(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Where each token of `encode` begins in the text, in characters. A character of several
        tokens begins with its first; tokens beside the text have the place where the one before
        them ends."""
        ...

    def token_text(self, token_id: int) -> str:
        """The token alone as text, as logprobs report it; "" beyond the vocabulary."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        `continue_final_message` leaves the last message open, for the model to go on with.
        Raises RequestError where the template refuses the messages or there is no template.
        """
        ...

    def check_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> int:
        """The characters of a conversation. Raises RequestError where a message is not in order or
        the template would drop a part of it, tools for example."""
        ...

    def compile_templates(self) -> None:
        """Do now what the first conversation would wait for. Called where a checkpoint's program
        that doesn't end can be stopped. Raises ModelError where a chat template is broken."""
        ...

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        takes_over: bool = False,
    ) -> IncrementalDetokenizer:
        """For an answer that follows these tokens; () where it begins a text. `takes_over`: broken
        bytes that end the prompt are the answer's (core.interfaces.text.Prompt.is_open)."""
        ...


class TokenizerKind(Protocol):
    """Tokenizers whose files are of one form. Made where a model's files are looked for, in a
    process that imports no library that tokenizes: `loader` names what does, in others."""

    needs: str  # what a folder must hold, for the error where no kind takes it: "tokenizer.json"
    # Files of a repository on the Hugging Face Hub, as patterns of names; *.json and *.jinja are
    # fetched anyway.
    hub_files: Sequence[str]
    loader: str  # "package.module:function", a LoadTokenizer

    def recognises(self, folder: Path) -> bool:
        """Whether an existing folder holds files of this kind. Cheap; never raises."""
        ...


class LoadTokenizer(Protocol):
    """Imported and called where text is tokenized, within limits of CPU time and memory, and where
    answers are written. Never imports torch."""

    def __call__(self, folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
        """The tokenizer of a folder. `eos_ids`: those known to end an answer, which come first in
        its `eos_ids`. Raises ModelError naming the file that is missing or broken."""
        ...
