"""Request bodies as typed structs, and decoding that names what is wrong.

Knows nothing of limits (see limits.py). Unknown fields are refused as OpenAI does; the fields
under "accepted and ignored" are OpenAI's own that mean nothing here. Every optional field may be
null, as OpenAI's clients send it.
"""

import difflib
import re
from typing import Any, TypeVar

import msgspec

from core.errors import RequestError
from plugins.frontends._openai.errors import MAX_NAME_CHARACTERS, shorten

T = TypeVar("T", bound=msgspec.Struct)


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
    add_special_tokens: bool | None = None
    # Accepted and ignored.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None


class CompletionRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[Any]  # a string, strings, token ids, or lists of token ids
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None  # a variable of the template
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


def decode(body: bytes, kind: type[T]) -> T:
    """A request body as `kind`. Raises RequestError naming the field and what is expected."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from error
    except msgspec.DecodeError as error:
        raise _explain_malformed(str(error), body) from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error


def _explain(text: str, kind: type[msgspec.Struct]) -> RequestError:
    """A msgspec sentence, "Expected `int`, got `str` - at `$.n`", in our words."""
    message, _, path = text.partition(" - at ")
    found = re.search(r"\$\.?([^`]*)", path)
    param = found.group(1) if found else None
    unknown = re.match(r"Object contains unknown field `(.*)`", message, re.DOTALL)
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
