"""What a request may ask for: every check on values, and sampling parameters from a body.

Knows nothing of HTTP. Each RequestError names the parameter and the allowed range, and shows a
value only where it is a number of ordinary size.
"""

from typing import Any

from core.errors import RequestError
from core.frontend.fields import SamplingFields
from core.frontend.limits import SEED_MASK, check_range, check_token_ids
from core.interfaces.frontend import ServedModel
from core.interfaces.messages import SamplingParams
from core.settings.config import FrontendConfig

MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
ALLOWED = "allowed_token_ids"  # a field, and the name of a logits processor
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


def check_sampling(body: SamplingFields, model: ServedModel) -> None:
    """The checks that don't depend on the prompt, stop strings apart."""
    for param, (least, most) in _RANGES.items():
        check_range(param, getattr(body, param), least, most)
    check_token_ids("stop_token_ids", body.stop_token_ids or (), model, MAX_STOP_TOKEN_IDS)
    check_token_ids("logit_bias", tuple(body.logit_bias or ()), model, MAX_LOGIT_BIAS)
    for bias in (body.logit_bias or {}).values():
        check_range("logit_bias", bias, -100.0, 100.0)


def stop_strings(body: SamplingFields, config: FrontendConfig) -> tuple[str, ...]:
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


def sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int,
    model: ServedModel,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How one answer is sampled: the body's values, the model's defaults for those left out.

    Call after `check_sampling`. `n` answers share the result but for the seed (`seed_of_choice`).
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
        logits_processors=_processors(body),
        seed=None if body.seed is None else body.seed & SEED_MASK,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _processors(body: SamplingFields) -> dict[str, dict[str, Any]]:
    """What is done to logits, by the name of who does it; vLLM's own field is one of ours."""
    named = body.logits_processors or {}
    if body.allowed_token_ids is None:
        return named
    if ALLOWED in named:
        raise RequestError(
            f"{ALLOWED} is given twice: as a field, and in logits_processors; keep one",
            param=ALLOWED,
            code="invalid_value",
        )
    return {**named, ALLOWED: {"ids": body.allowed_token_ids}}
