"""What a caller of `LLM` hands in, checked and brought into one form. Computes nothing."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from core.errors import RequestError
from core.interfaces.messages import SamplingParams

TextPrompt = str | Sequence[int]
Message = Mapping[str, Any]
Sampling = SamplingParams | Sequence[SamplingParams] | None


def as_prompts(prompts: Any) -> list[TextPrompt]:
    """One prompt or several as a list of them. Raises RequestError naming the one that is none."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise _wrong_prompt("prompts", prompts)
    if prompts and all(_is_id(item) for item in prompts):
        return [list(prompts)]
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list | tuple):
            raise _wrong_prompt(f"prompts[{index}]", prompt)
        for place, item in enumerate(prompt):
            if not _is_id(item):
                raise _wrong_prompt(f"prompts[{index}][{place}]", item, "a token id (int)")
    return list(prompts)


def _is_id(value: object) -> bool:
    return type(value) is int


def _wrong_prompt(
    name: str, value: object, allowed: str = "text, a list of token ids, or a list of such prompts"
) -> RequestError:
    return RequestError(
        f"{name} is {type(value).__name__}; it must be {allowed}",
        param="prompts",
        code="invalid_type",
    )


def as_conversations(messages: Any) -> list[Sequence[Message]]:
    """One conversation or several as a list of them."""
    if isinstance(messages, list | tuple):
        if messages and all(isinstance(message, Mapping) for message in messages):
            return [messages]
        if all(isinstance(one, list | tuple) for one in messages):
            return list(messages)
    raise RequestError(
        'messages must be a list of messages, each like {"role": "user", "content": "Hello"}, or a '
        f"list of such lists; this is {_kind(messages)}",
        param="messages",
        code="invalid_type",
    )


def _kind(value: object) -> str:
    if not isinstance(value, list | tuple):
        return type(value).__name__
    names = dict.fromkeys(type(item).__name__ for item in value)
    return f"{type(value).__name__} of {' and '.join(names)}"


def as_stops(stop: Any) -> tuple[str, ...]:
    """The stop strings, checked."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(one, str) and one for one in stops):
        raise RequestError(
            "stop must be a text that is not empty, or a list of such", param="stop",
            code="invalid_type",
        )  # fmt: skip
    return stops


def each(sampling: Sampling, count: int) -> Sequence[SamplingParams | None]:
    """The parameters of each prompt; None: the model's own."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * count
    if not isinstance(sampling, list | tuple):
        raise RequestError(
            f"sampling is {type(sampling).__name__}; it must be SamplingParams, a list of one for "
            "each prompt, or None",
            param="sampling",
            code="invalid_type",
        )
    if len(sampling) != count:
        raise RequestError(
            f"there are {count} prompts and {len(sampling)} SamplingParams; give one for all, or "
            "one for each",
            param="sampling",
            code="out_of_range",
        )
    return sampling


def as_json(value: Any, param: str) -> bytes:
    """Plain values as the text service takes them."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, UnicodeError) as error:
        raise RequestError(f"{param} can't be written as JSON: {error}", param=param) from error


@contextlib.contextmanager
def named(index: int, count: int) -> Iterator[None]:
    """Of several prompts the one that is refused is named."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise RequestError(
            f"prompt {index} (of 0 to {count - 1}): {error}",
            param=error.param,
            code=error.code,
            status=error.status,
        ) from error
