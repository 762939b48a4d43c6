"""The interface of tokenizers, and of kinds of tokenizers, which find the one of a model.

A *kind* recognises its folders and names the function that loads a tokenizer from one. A tokenizer
belongs to one model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class IncrementalDetokenizer(Protocol):
    """Text of one answer, token by token: the text of prompt and answer without the prompt's."""

    @property
    def holding(self) -> bool:
        """Whether a part of a character is being held back."""
        ...

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete. A partial UTF-8 character is held back."""
        ...

    def finish(self) -> str:
        """Return the text that was held back, with U+FFFD for broken bytes."""
        ...


class Tokenizer(Protocol):
    """Turns text into ids and ids into text, for one model.

    Built in the processes that render and tokenize, and in the process that writes answers, which
    only needs the text of ids."""

    vocab_size: int
    max_token_id: int  # can be above `vocab_size`, which is a count: ids can have gaps
    eos_ids: tuple[int, ...]
    max_token_characters: int  # of the longest token; gives the least token count of a text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def decode_open(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of a prompt that will be continued, with special tokens.

        The bool tells whether the last tokens began a character. That character is left out here,
        and a detokenizer with `takes_over` returns it."""
        ...

    def offsets(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return where each token of `encode` begins in the text, in characters.

        A character of several tokens belongs to its first token. A token without text has the
        position where the token before it ends."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return the text of the token alone, for logprobs; "" if it is not in the vocabulary."""
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
        """Return the prompt text of a conversation. Encode it without adding special tokens.

        `continue_final_message` leaves the last message open, so that the model continues it.
        Raises RequestError if the template refuses the messages, or if there is no template.
        """
        ...

    def check_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> int:
        """Return the number of characters of a conversation.

        Raises RequestError if a message is invalid, or if the template would drop a part of the
        conversation, such as tools."""
        ...

    def compile_templates(self) -> None:
        """Compile the chat templates now, so that the first conversation does not wait for it.

        Called in a process that can be stopped if a checkpoint's program does not end. Raises
        ModelError if a chat template is broken."""
        ...

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        takes_over: bool = False,
    ) -> IncrementalDetokenizer:
        """Return a detokenizer for an answer after `prompt_ids` (empty: it begins a text).

        `takes_over`: broken bytes at the end of the prompt belong to the answer
        (core.interfaces.text.Prompt.is_open)."""
        ...


class TokenizerKind(Protocol):
    """Tokenizers with one format of files.

    Created where a model's files are searched, in a process that must not import a tokenizer
    library. `loader` names the function that other processes call."""

    # What a folder must have, such as "tokenizer.json"; for the error if no kind recognises it.
    needs: str
    # Patterns of files in a repository of the Hugging Face Hub. *.json and *.jinja are fetched
    # anyway.
    hub_files: Sequence[str]
    loader: str  # "package.module:function", a LoadTokenizer

    def recognises(self, folder: Path) -> bool:
        """Whether an existing folder has files of this kind. Cheap; never raises."""
        ...


class LoadTokenizer(Protocol):
    """The function behind `TokenizerKind.loader`. Must not import torch.

    Called in the processes that tokenize, within limits of CPU time and memory, and in the process
    that writes answers."""

    def __call__(self, folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
        """Load the tokenizer of a folder.

        `eos_ids` are the ids that are known to end an answer. They come first in the tokenizer's
        `eos_ids`. Raises ModelError, which names the missing or broken file."""
        ...
