"""Request bodies as typed structs, and decoding that names what is wrong.

Knows nothing of limits (see limits.py). Every field of OpenAI's is taken, and every optional one
may be null, as OpenAI's clients send it. Unknown ones are ignored and reported, or refused
(fields.py).
"""

import difflib
import re
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from core.errors import RequestError
from plugins.frontends._openai.errors import MAX_NAME_CHARACTERS, shorten
from plugins.frontends._openai.fields import check_refused

T = TypeVar("T", bound=msgspec.Struct)

# Fields of type Raw hold what may be long: they stay as they came, for the text service to read.
NULL = msgspec.Raw(b"null")
_UNKNOWN_FIELD = "Object contains unknown field"


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored: no padding is ever added


class Generation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    # Beyond OpenAI, named as in other engines.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None  # the lower, the sooner a waiting request is begun
    add_special_tokens: bool | None = None
    # OpenAI's own that change no answer: accepted and ignored.
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None  # speeds up an answer, and is no part of it
    # OpenAI's own that could have changed something: ignored, and reported unless they ask for
    # what is so anyway (see IGNORED).
    audio: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# Fields of Generation that are ignored -> the value that asks for nothing.
IGNORED = {
    "audio": None,
    "moderation": None,
    "parallel_tool_calls": True,
    "store": False,
    "verbosity": "medium",
    "web_search_options": None,
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


class Decoded(NamedTuple, Generic[T]):
    """A body, and the names of the fields that were given and have no effect."""

    body: T
    ignored: list[str]


def decode(body: bytes, kind: type[T], *, strict: bool = False) -> Decoded[T]:
    """A request body as `kind`. Raises RequestError naming the field and what is expected.

    Unknown fields are left out; with `strict` they are errors.
    """
    try:
        try:
            decoded, unknown = msgspec.json.decode(body, type=kind), []
        except msgspec.ValidationError as error:
            if strict or not str(error).startswith(_UNKNOWN_FIELD):
                raise
            body, unknown = _without_unknown(body, kind)
            decoded = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from error
    except msgspec.DecodeError as error:
        raise _explain_malformed(str(error), body) from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    if isinstance(decoded, Generation):
        asked = {name: getattr(decoded, name) for name in IGNORED}
        unknown += [name for name in IGNORED if asked[name] not in (None, IGNORED[name])]
    return Decoded(decoded, unknown)


def _without_unknown(body: bytes, kind: type[msgspec.Struct]) -> tuple[bytes, list[str]]:
    """The body without the fields that `kind` does not have, and their names."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    unknown = {
        name: fields.pop(name) for name in list(fields) if name not in kind.__struct_fields__
    }
    check_refused(unknown)
    names = list(unknown)
    options = fields.get("stream_options")
    if options is not None and bytes(options).startswith(b"{"):
        inner = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
        known = {n: v for n, v in inner.items() if n in StreamOptions.__struct_fields__}
        names += [f"stream_options.{name}" for name in inner if name not in known]
        fields["stream_options"] = msgspec.Raw(msgspec.json.encode(known))
    return msgspec.json.encode(fields), names


def _explain(text: str, kind: type[msgspec.Struct]) -> RequestError:
    """A msgspec sentence, "Expected `int`, got `str` - at `$.n`", in our words."""
    message, _, path = text.partition(" - at ")
    found = re.search(r"\$\.?([^`]*)", path)
    param = found.group(1) if found else None
    unknown = re.match(_UNKNOWN_FIELD + r" `(.*)`", message, re.DOTALL)
    if unknown:
        name = str(shorten(unknown.group(1), MAX_NAME_CHARACTERS))
        known = StreamOptions.__struct_fields__ if param else kind.__struct_fields__
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        full = f"{param}.{name}" if param else name
        return RequestError(
            f"Unrecognized request argument supplied: {full}{hint}",
            param=full,
            code="unknown_parameter",
        )
    missing = re.match(r"Object missing required field `(.*)`", message)
    if missing:
        return RequestError(
            f"{missing.group(1)} is required", param=missing.group(1), code="missing_parameter"
        )
    words = message.replace("`", "").replace("null", "nothing").replace(" | ", " or ")
    words = words[:1].lower() + words[1:]
    subject = param or "the body"
    return RequestError(f"{subject}: {words}", param=param, code="invalid_type")


def _explain_malformed(text: str, body: bytes) -> RequestError:
    position = re.search(r"\(byte (\d+)\)", text)
    if position:
        at = int(position.group(1))
        before = re.search(rb'"(\w{1,64})"\s*:\s*-?[NIa-z]*$', body[max(at - 100, 0) : at + 1])
        if before and re.match(rb"-?(NaN|Infinity)", body[max(at - 1, 0) : at + 9].lstrip(b": ")):
            name = before.group(1).decode()
            return RequestError(
                f"{name} is NaN or infinite; it must be a finite number",
                param=name,
                code="invalid_json",
            )
    return RequestError(f"the body is not valid JSON: {text}", code="invalid_json")
