"""What the engine refuses before a worker hears of it, whichever frontend asks.

A worker trusts what it is sent: an id beyond the embedding, a number that its arrays can't hold or
a message that it can't decode ends it, and the whole engine with it. So everything a frontend hands
to `Engine.generate` is checked here, after tokenizing, types included. Frontends may be stricter,
and may name things as their clients do. Knows nothing of HTTP, of text or of sockets.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from core.errors import RequestError
from core.interfaces.messages import SamplingParams
from core.interfaces.sampling import LogitsProcessorKind
from core.interfaces.tokenizer import Tokenizer
from core.serve.processor_check import check_processors

MAX_REQUEST_ID_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 4096
MAX_LOGIT_BIAS = 4096
MAX_PRIORITY = 2**31 - 1
MAX_LOGPROBS = 1000  # alternatives of one token
# Numbers that one answer's prompt logprobs may consist of: they are sent in one message.
MAX_PROMPT_LOGPROB_VALUES = 4 * 1024 * 1024
_MOST_INT = 2**31 - 1

# Ranges wide enough for what anybody samples with, and narrow enough for float32 arithmetic.
_FLOATS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1000.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-1000.0, 1000.0),
    "frequency_penalty": (-1000.0, 1000.0),
    "repetition_penalty": (0.001, 1000.0),
}
_BIAS_RANGE = (-1e6, 1e6)
_INTS: dict[str, tuple[int, int]] = {
    "max_tokens": (0, _MOST_INT),
    "min_tokens": (0, _MOST_INT),
    "top_k": (-1, _MOST_INT),
}
_OPTIONAL_INTS: dict[str, tuple[int, int]] = {
    "seed": (-(2**63), 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What the engine can take."""

    vocab_size: int  # rows of the model's embedding, whatever the tokenizer has
    max_model_len: int  # tokens, prompt and answer together
    processors: Mapping[str, LogitsProcessorKind] = field(default_factory=dict)  # by name

    def at_most(self, max_model_len: int | None) -> "RequestLimits":
        """The same with a context no longer than this; None: nothing is known."""
        if max_model_len is None:
            return self
        return replace(self, max_model_len=min(self.max_model_len, max_model_len))

    def check(
        self, request_id: str, prompt_ids: list[int], sampling: SamplingParams, priority: int
    ) -> None:
        """Raise RequestError (status 400) whose `param` is the first argument, or field of
        `sampling`, that is out of what is allowed."""
        _check_id(request_id)
        _check_int("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        self._check_prompt(prompt_ids)
        if not isinstance(sampling, SamplingParams):
            raise _wrong_type("sampling", sampling, "SamplingParams")
        for name, (least, most) in _FLOATS.items():
            _check_float(name, getattr(sampling, name), least, most)
        for name, (low, high) in _INTS.items():
            _check_int(name, getattr(sampling, name), low, high)
        for name, (low, high) in _OPTIONAL_INTS.items():
            if getattr(sampling, name) is not None:
                _check_int(name, getattr(sampling, name), low, high)
        if type(sampling.ignore_eos) is not bool:
            raise _wrong_type("ignore_eos", sampling.ignore_eos, "true or false")
        self._check_stop_ids(sampling.stop_token_ids)
        self._check_bias(sampling.logit_bias)
        check_processors(sampling.logits_processors, self.processors, self.vocab_size)
        _check_prompt_logprobs(len(prompt_ids), sampling.prompt_logprobs)

    def _check_prompt(self, prompt_ids: list[int]) -> None:
        if type(prompt_ids) is not list:
            raise _wrong_type("prompt_ids", prompt_ids, "a list of token ids")
        count = len(prompt_ids)
        if count == 0:
            raise RequestError("the prompt is empty", param="prompt_ids", code="empty_prompt")
        if count >= self.max_model_len:
            raise RequestError(
                f"the prompt has {count} tokens; allowed: 1 to {self.max_model_len - 1}, as the "
                f"context is {self.max_model_len} tokens, prompt and answer together",
                param="prompt_ids",
                code="context_length_exceeded",
            )
        self._check_ids("prompt_ids", prompt_ids, "the prompt")

    def _check_stop_ids(self, stop_ids: list[int]) -> None:
        if type(stop_ids) is not list:
            raise _wrong_type("stop_token_ids", stop_ids, "a list of token ids")
        _check_count("stop_token_ids", stop_ids, MAX_STOP_TOKEN_IDS)
        self._check_ids("stop_token_ids", stop_ids, "stop_token_ids")

    def _check_bias(self, bias: dict[int, float]) -> None:
        if type(bias) is not dict:
            raise _wrong_type("logit_bias", bias, "a dict from token ids to numbers")
        _check_count("logit_bias", bias, MAX_LOGIT_BIAS)
        self._check_ids("logit_bias", bias, "logit_bias")
        for value in bias.values():
            _check_float("logit_bias", value, *_BIAS_RANGE)

    def _check_ids(self, param: str, token_ids: Collection[int], what: str) -> None:
        if not token_ids:
            return
        if set(map(type, token_ids)) != {int}:
            raise RequestError(f"{what} must hold integers only", param=param, code="invalid_type")
        least, most = min(token_ids), max(token_ids)
        if least < 0 or most >= self.vocab_size:
            raise RequestError(
                f"{what} holds a token id{_shown(least if least < 0 else most)} outside the "
                f"model's vocabulary; allowed: 0 to {self.vocab_size - 1}",
                param=param,
                code="out_of_range",
            )


def size_problem(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """What follows where a tokenizer has ids that the model's embedding of so many rows has not;
    None where it has none. More rows than tokens are common, and harmless."""
    beyond = tokenizer.max_token_id - vocab_size + 1
    if beyond <= 0:
        return None
    example = tokenizer.token_text(tokenizer.max_token_id)
    text = (
        f"the tokenizer has ids up to {tokenizer.max_token_id}, but the model's embedding has "
        f"{vocab_size} rows (vocab_size): requests whose text holds a token beyond, such as "
        f"{example!r}, are refused with status 400; a tokenizer that was extended without the "
        "model (resize_token_embeddings) is the usual cause"
    )
    if tokenizer.eos_ids and min(tokenizer.eos_ids) >= vocab_size:
        text += (
            "; the tokens that end an answer are among those, so that answers end at max_tokens "
            "or at a stop string only"
        )
    return text


def _check_id(request_id: str) -> None:
    if type(request_id) is not str:
        raise _wrong_type("request_id", request_id, "text")
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARACTERS or not request_id.isascii():
        raise RequestError(
            f"a request id has {len(request_id)} characters; allowed: 1 to "
            f"{MAX_REQUEST_ID_CHARACTERS} of ASCII",
            param="request_id",
            code="out_of_range",
        )


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int:
        raise _wrong_type(name, value, "a whole number")
    if not least <= value <= most:
        raise _out_of_range(name, value, least, most)


def _check_float(name: str, value: Any, least: float, most: float) -> None:
    if type(value) is not float and type(value) is not int:
        raise _wrong_type(name, value, "a number")
    if not least <= value <= most:  # NaN is in no range
        raise _out_of_range(name, value, least, most)


def _check_count(name: str, values: Collection[Any], most: int) -> None:
    if len(values) > most:
        raise RequestError(
            f"{name} has {len(values)} entries; allowed: 0 to {most}",
            param=name,
            code="out_of_range",
        )


def _check_prompt_logprobs(num_prompt: int, wanted: int | None) -> None:
    if wanted is not None and num_prompt * (wanted + 1) > MAX_PROMPT_LOGPROB_VALUES:
        most = max(MAX_PROMPT_LOGPROB_VALUES // num_prompt - 1, 0)
        raise RequestError(
            f"prompt_logprobs={wanted} of {num_prompt} tokens is too much to send; allowed for "
            f"this prompt: 0 to {most}",
            param="prompt_logprobs",
            code="out_of_range",
        )


def _out_of_range(name: str, value: float, least: float, most: float) -> RequestError:
    return RequestError(
        f"{name}{_shown(value)} is out of range; allowed: {least} to {most}",
        param=name,
        code="out_of_range",
    )


def _wrong_type(name: str, value: Any, allowed: str) -> RequestError:
    return RequestError(
        f"{name} is {type(value).__name__}; it must be {allowed}",
        param=name,
        code="invalid_type",
    )


def _shown(value: float) -> str:
    """A number in brackets, unless it has more digits than anybody wants to read."""
    return "" if abs(value) >= 10**18 else f" ({value})"
