"""What a request may ask for: every check on values, and sampling parameters from a body.

Knows nothing of HTTP. Each RequestError names the parameter and the allowed range, and shows a
value only where it is a number of ordinary size.
"""

from collections.abc import Sequence
from typing import Any

from core.errors import RequestError
from core.interfaces.frontend import ServedModel
from core.interfaces.messages import SamplingParams
from core.settings.config import FrontendConfig
from plugins.frontends._openai.protocol import Generation

MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "top_k": (-1, 2**31 - 1),
    "seed": (-(2**63), 2**64 - 1),
    "priority": (-(2**31) + 1, 2**31 - 1),
}
_SEED_MASK = 2**64 - 1


def check_range(param: str, value: float | None, least: float, most: float) -> None:
    """Raise RequestError unless `least <= value <= most`; None (not given) passes."""
    if value is not None and not least <= value <= most:
        shown = f"{param}={value}" if abs(value) < 1e18 else param
        raise RequestError(
            f"{shown} is out of range; allowed: {least} to {most}", param=param, code="out_of_range"
        )


def check_model(name: str | None, model: ServedModel) -> None:
    """Raise 404 unless the request names the model that is served, or none."""
    if name is not None and name != model.name:
        raise RequestError(
            f"the model {name[:64]!r} does not exist; this server has {model.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_generation(body: Generation, config: FrontendConfig, model: ServedModel) -> None:
    """The checks that don't depend on the prompt."""
    check_model(body.model, model)
    for param, (least, most) in _RANGES.items():
        check_range(param, getattr(body, param), least, most)
    check_range("n", body.n, 1, config.max_n)
    check_range("prompt_logprobs", body.prompt_logprobs, 0, config.max_logprobs)
    check_token_ids("stop_token_ids", body.stop_token_ids or (), model, MAX_STOP_TOKEN_IDS)
    check_token_ids("logit_bias", tuple(body.logit_bias or ()), model, MAX_LOGIT_BIAS)
    for bias in (body.logit_bias or {}).values():
        check_range("logit_bias", bias, -100.0, 100.0)
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is allowed only with stream=true", param="stream_options"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs can't be streamed", param="prompt_logprobs")


def stop_strings(body: Generation, config: FrontendConfig) -> tuple[str, ...]:
    """The stop strings of a request, checked."""
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > config.max_stop:
        raise RequestError(
            f"stop has {len(stops)} strings; allowed: 0 to {config.max_stop}",
            param="stop",
            code="out_of_range",
        )
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string has {len(stop)} characters; allowed: 1 to {MAX_STOP_CHARACTERS}",
                param="stop",
                code="out_of_range",
            )
    return tuple(dict.fromkeys(stops))


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


def sampling_params(
    body: Generation,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    model: ServedModel,
) -> SamplingParams:
    """How one answer is sampled: the body's values, the model's defaults for those left out.

    Call after `check_generation`. `n` answers share the result, except for `with_choice`.
    """
    defaults = model.default_sampling

    def value(name: str, fallback: float) -> float:
        given = getattr(body, name)
        return float(defaults.get(name, fallback)) if given is None else float(given)

    min_tokens = body.min_tokens or 0
    check_range("min_tokens", body.min_tokens, 0, max_tokens)
    top_p = value("top_p", 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        # No share of the probability at all leaves the best token, as temperature 0 does.
        temperature=value("temperature", 1.0) if top_p else 0.0,
        top_k=max(int(value("top_k", 0)), 0),
        top_p=top_p or 1.0,
        min_p=value("min_p", 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=value("repetition_penalty", 1.0),
        logit_bias=body.logit_bias or {},
        seed=None if body.seed is None else body.seed & _SEED_MASK,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Answer i of n is seeded with seed + i, so that answers differ and can be had again."""
    return None if seed is None else (seed + choice) & _SEED_MASK
