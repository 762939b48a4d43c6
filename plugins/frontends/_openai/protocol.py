"""Request bodies as typed structs.

Knows nothing of limits (see limits.py) or of how bodies are read (core.frontend.decoding). Every
field of OpenAI's is taken, and every optional one may be null, as OpenAI's clients send it.
"""

from typing import Any

import msgspec

from core.frontend.fields import SamplingFields

# Fields of type Raw hold what may be long: they stay as they came, for the text service to read.
NULL = msgspec.Raw(b"null")


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored: no padding is ever added


class Generation(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    # OpenAI's own that change no answer: accepted and ignored (see WITHOUT_EFFECT).
    user: msgspec.Raw = NULL
    metadata: msgspec.Raw = NULL
    service_tier: msgspec.Raw = NULL
    safety_identifier: msgspec.Raw = NULL
    prompt_cache_key: msgspec.Raw = NULL
    prompt_cache_options: msgspec.Raw = NULL
    prompt_cache_retention: msgspec.Raw = NULL
    prediction: msgspec.Raw = NULL  # speeds up an answer, and is no part of it
    # OpenAI's own that could have changed something: ignored, and reported unless they ask for
    # what is so anyway (see IGNORED).
    audio: msgspec.Raw = NULL
    moderation: msgspec.Raw = NULL
    parallel_tool_calls: msgspec.Raw = NULL
    store: msgspec.Raw = NULL
    verbosity: msgspec.Raw = NULL
    web_search_options: msgspec.Raw = NULL


WITHOUT_EFFECT = (
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "prediction", "audio", "moderation",
    "parallel_tool_calls", "store", "verbosity", "web_search_options",
)  # fmt: skip
# Those of them that are reported -> the JSON that asks for nothing, besides null.
IGNORED = {
    "audio": b"null",
    "moderation": b"null",
    "parallel_tool_calls": b"true",
    "store": b"false",
    "verbosity": b'"medium"',
    "web_search_options": b"null",
}


class CompletionRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    # A string, strings, token ids, or lists of token ids; null: nothing but what the tokenizer
    # puts before a text.
    prompt: msgspec.Raw
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    messages: msgspec.Raw
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: msgspec.Raw = NULL
    tool_choice: Any = None
    functions: msgspec.Raw = NULL  # what tools were called before
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None  # a variable of the template
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: msgspec.Raw = NULL

    def __post_init__(self) -> None:
        """Read OpenAI's older name for tool_choice."""
        if self.function_call is not None and self.tool_choice is None:
            choice = self.function_call
            named = isinstance(choice, dict)
            self.tool_choice = {"type": "function", "function": choice} if named else choice


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: msgspec.Raw = NULL
    messages: msgspec.Raw = NULL
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: msgspec.Raw = NULL
    tools: msgspec.Raw = NULL


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: msgspec.Raw
