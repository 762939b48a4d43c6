"""Checks that name a client's parameter, and lengths of prompts and answers, for every frontend.

`core.serve.request_check` keeps workers safe whatever a frontend does; this is for what clients are
told. Knows nothing of HTTP. Each RequestError names the parameter and what is allowed, and shows a
value only where it is a number of ordinary size.
"""

from collections.abc import Sequence
from typing import Any

from core.errors import RequestError
from core.interfaces.frontend import ServedModel

SEED_MASK = 2**64 - 1


def check_range(param: str, value: float | None, least: float, most: float) -> None:
    """Raise RequestError unless `least <= value <= most`; None (not given) passes."""
    if value is not None and not least <= value <= most:
        shown = f"{param}={value}" if abs(value) < 1e18 else param
        raise RequestError(
            f"{shown} is out of range; allowed: {least} to {most}", param=param, code="out_of_range"
        )


def check_token_ids(
    param: str, token_ids: Sequence[Any], model: ServedModel, max_count: int | None = None
) -> None:
    """Raise RequestError unless all are integers of the vocabulary, and not too many."""
    if max_count is not None and len(token_ids) > max_count:
        raise RequestError(
            f"{param} has {len(token_ids)} entries; allowed: 0 to {max_count}",
            param=param,
            code="out_of_range",
        )
    if not token_ids:
        return
    if not all(type(token_id) is int for token_id in token_ids):
        raise RequestError(f"{param} must hold integers only", param=param, code="invalid_type")
    least, most = min(token_ids), max(token_ids)
    if least < 0 or most >= model.vocab_size:
        wrong = least if least < 0 else most
        shown = f" ({wrong})" if abs(wrong) < 10**18 else ""
        raise RequestError(
            f"{param} holds a token id{shown} outside the vocabulary; "
            f"allowed: 0 to {model.vocab_size - 1}",
            param=param,
            code="out_of_range",
        )


def check_prompt_length(num_tokens: int, model: ServedModel, param: str) -> None:
    """Raise unless the prompt has a token and leaves room for one."""
    if num_tokens == 0:
        raise RequestError("the prompt is empty", param=param, code="empty_prompt")
    if num_tokens >= model.max_model_len:
        raise context_too_long(f"the prompt has {num_tokens} tokens", model, param)


def context_too_long(what: str, model: ServedModel, param: str) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {model.max_model_len} tokens, prompt and answer "
        f"together; {what}",
        param=param,
        code="context_length_exceeded",
    )


def answer_tokens(
    asked: int | None,
    default: int | None,
    num_prompt: int,
    model: ServedModel,
    param: str,
    *,
    strict: bool,
) -> int:
    """max_tokens of one prompt, at most the rest of the context, which `default` None means.

    With `strict` more than that is an error: for clients that would rather know than get less.
    """
    room = model.max_model_len - num_prompt
    if asked is None:
        asked = room if default is None else default
    elif strict and asked > room:
        shown = asked if asked < 10**18 else "more"
        raise context_too_long(
            f"the prompt has {num_prompt} tokens and {param} asks for {shown}", model, param
        )
    return min(asked, room)


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Answer i of n is seeded with seed + i, so that answers differ and can be had again."""
    return None if seed is None else (seed + choice) & SEED_MASK
