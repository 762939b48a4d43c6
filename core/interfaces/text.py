"""The jobs of the text service: conversations and prompts to token ids, and back.

They are plain data that is sent over a pipe. What clients sent stays JSON, so the event loop does
not have to build objects from it. Every job can raise RequestError.
"""

from typing import Any, Protocol

import msgspec

MAX_TOKENIZED = 1024 * 1024  # most tokens of /tokenize and /detokenize


class ChatText(msgspec.Struct, tag="chat", kw_only=True):
    """A conversation to render and tokenize."""

    messages: bytes  # JSON
    tools: bytes = b"null"  # JSON
    functions: bytes = b"null"  # JSON: OpenAI's older name of tools
    variables: bytes = b"null"  # JSON: further variables for the template
    defaults: dict[str, Any] = {}  # used for names that `variables` lacks
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    max_tokens: int = MAX_TOKENIZED  # the ids of a longer prompt are not returned


class PromptTexts(msgspec.Struct, tag="prompts", kw_only=True):
    """One or several prompts."""

    prompt: bytes  # JSON: a text, texts, token ids, or lists of token ids
    vocab_size: int  # ids must be below it
    add_special_tokens: bool = True
    max_prompts: int = 1
    max_tokens: int = MAX_TOKENIZED  # of each prompt; ids of a longer one are not returned
    echo: bool = False  # also return the text of each
    offsets: bool = False  # also return where tokens begin, unless the tokens' texts tell it


class TokenList(msgspec.Struct, tag="tokenize", kw_only=True):
    """Token ids, and with `strings` the text of each token, as JSON that is ready to send."""

    source: ChatText | PromptTexts
    strings: bool = False


class IdsToText(msgspec.Struct, tag="detokenize", kw_only=True):
    """Token ids to text."""

    tokens: bytes  # JSON
    vocab_size: int


class SplitBody(msgspec.Struct, tag="split", kw_only=True):
    """A large body to split, without making objects of its large parts."""

    body: bytes  # JSON
    text_fields: list[str]  # of any length
    known_fields: list[str]
    ignored_fields: list[str]  # known ones; a long value becomes an empty object
    max_field_bytes: int  # of each other known field
    max_unknown_bytes: int  # of all unknown fields together; if less, each is named
    unnamed: str  # the name that replaces all others if they are larger


class BodyParts(msgspec.Struct, kw_only=True):
    """The answer to a SplitBody."""

    rest: bytes  # the JSON object, with null for text fields and 0 for unknown ones
    texts: dict[str, bytes]  # JSON by field


TextJob = ChatText | PromptTexts | TokenList | IdsToText | SplitBody


class Prompt(msgspec.Struct, kw_only=True):
    """A prompt as tokens. `ids` is empty if it has more than `max_tokens` tokens."""

    num_tokens: int
    ids: list[int] = []
    at_least: bool = False  # `num_tokens` is a lower bound: the text was too long to tokenize
    text: str | None = None  # if it was asked for
    # Whether `text` leaves out a character that the last token ids began. It belongs to the answer,
    # even if it is never completed.
    is_open: bool = False
    # Where each token begins in the text, in characters. None if that was not asked for, or if the
    # tokens' own texts, joined in order, are the text.
    offsets: list[int] | None = None


class TokensJson(msgspec.Struct, kw_only=True):
    """The answer to a TokenList."""

    num_tokens: int
    tokens: bytes  # JSON
    strings: bytes  # JSON


class TextService(Protocol):
    """Renders and tokenizes outside the event loop, within limits of CPU time and memory.

    All methods raise RequestError: 400 if the template, the tokenizer or a limit refuses the job,
    503 if the machine is too busy.
    """

    async def chat(self, job: ChatText) -> Prompt: ...

    async def prompts(self, job: PromptTexts) -> list[Prompt]: ...

    async def tokenize(self, job: TokenList) -> TokensJson: ...

    async def detokenize(self, job: IdsToText) -> bytes:
        """Return the text as JSON."""
        ...

    async def split(self, job: SplitBody) -> BodyParts: ...
