"""What a frontend asks of the text service: conversations and prompts to token ids, and back.

Plain data that crosses a pipe. What clients sent stays JSON, so that the event loop need not build
objects of it. Every job may be refused with a RequestError.
"""

from typing import Any, Protocol

import msgspec

MAX_TOKENIZED = 1024 * 1024  # tokens that /tokenize or /detokenize answers or takes


class ChatText(msgspec.Struct, tag="chat", kw_only=True):
    """A conversation to be rendered and tokenized."""

    messages: bytes  # JSON
    tools: bytes = b"null"  # JSON
    functions: bytes = b"null"  # JSON: what tools were called before
    variables: bytes = b"null"  # JSON: what the template may read besides
    defaults: dict[str, Any] = {}  # the same, where `variables` has none of that name
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    max_tokens: int = MAX_TOKENIZED  # the ids of a longer prompt are not returned


class PromptTexts(msgspec.Struct, tag="prompts", kw_only=True):
    """One prompt or several."""

    prompt: bytes  # JSON: a text, texts, token ids, or lists of token ids
    vocab_size: int  # above all ids that are allowed
    add_special_tokens: bool = True
    max_prompts: int = 1
    max_tokens: int = MAX_TOKENIZED  # of each; the ids of a longer one are not returned
    echo: bool = False  # the text of each is wanted
    offsets: bool = False  # and where its tokens begin, where their own texts don't tell


class TokenList(msgspec.Struct, tag="tokenize", kw_only=True):
    """Ids, and on wish each token's text, as JSON that is ready to be sent."""

    source: ChatText | PromptTexts
    strings: bool = False


class IdsToText(msgspec.Struct, tag="detokenize", kw_only=True):
    """Token ids to text."""

    tokens: bytes  # JSON
    vocab_size: int


class SplitBody(msgspec.Struct, tag="split", kw_only=True):
    """A large body, to be taken apart without making objects of what is large in it."""

    body: bytes  # JSON
    text_fields: list[str]  # of any length
    known_fields: list[str]
    ignored_fields: list[str]  # of the known ones: an empty object stands for a long value
    max_field_bytes: int  # of each other known field
    max_unknown_bytes: int  # of all others together, to be named one by one
    unnamed: str  # the one name that stands for more


class BodyParts(msgspec.Struct, kw_only=True):
    """The answer to a SplitBody."""

    rest: bytes  # the JSON object, null for its text fields, 0 for unknown ones
    texts: dict[str, bytes]  # JSON by field


TextJob = ChatText | PromptTexts | TokenList | IdsToText | SplitBody


class Prompt(msgspec.Struct, kw_only=True):
    """A prompt as tokens. `ids` is empty where it has more than `max_tokens` of them."""

    num_tokens: int
    ids: list[int] = []
    at_least: bool = False  # `num_tokens` is a bound: the text was too long to be tokenized
    text: str | None = None  # where it was asked for
    # Whether `text` leaves out a character that the last of these token ids began: it is the
    # answer's, whatever becomes of it.
    is_open: bool = False
    # Where each token begins in the text, in characters. None where that is not asked for, or told
    # by the tokens' own texts: they are those of the text, in their order.
    offsets: list[int] | None = None


class TokensJson(msgspec.Struct, kw_only=True):
    """The answer to a TokenList."""

    num_tokens: int
    tokens: bytes  # JSON
    strings: bytes  # JSON


class TextService(Protocol):
    """Renders and tokenizes outside the event loop, within limits of CPU time and memory.

    All raise RequestError: 400 for what the template, the tokenizer or a limit refuses, 503 where
    the machine is too busy to say.
    """

    async def chat(self, job: ChatText) -> Prompt: ...

    async def prompts(self, job: PromptTexts) -> list[Prompt]: ...

    async def tokenize(self, job: TokenList) -> TokensJson: ...

    async def detokenize(self, job: IdsToText) -> bytes:
        """The text as JSON."""
        ...

    async def split(self, job: SplitBody) -> BodyParts: ...
