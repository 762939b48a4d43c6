"""What a generation_config.json says: each key is applied, harmless or warned of.

Knows nothing of tokens' texts or of requests.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import ModelError

MAX_TOKEN_IDS = 1000  # that end an answer
_LARGEST_ID = (1 << 32) - 1

_LARGEST_TOP_K = (1 << 31) - 1

# Defaults for requests that don't say: key -> (what is allowed, in words); no more than requests
# may say themselves.
_Check = Callable[[float], bool]
SAMPLING: Mapping[str, tuple[_Check, str]] = {
    "temperature": (lambda value: 0 <= value <= 100, "a number from 0 to 100"),
    "top_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "top_k": (
        lambda value: -1 <= value <= _LARGEST_TOP_K and value == int(value),
        f"a whole number up to {_LARGEST_TOP_K}, 0 or -1 for all tokens",
    ),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (
        lambda value: 0.01 <= value <= 100,
        "a number above 0: from 0.01 to 100",
    ),
}
# They make a choice where there is one, so that `do_sample: false` sets them aside.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
READ = frozenset({*SAMPLING, "do_sample", "eos_token_id"})

# Keys that would change answers and are not supported, and the values at which they do not.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "stop_strings": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "max_time": (None,),
}

_REQUEST = "requests say how long an answer may be, and how many there are"
_BEAMS = "only beam search reads it"
_HOW = "it chooses how transformers computes, not what"
_SPECULATION = "it speeds transformers up and leaves answers as they are"
_OUTPUTS = "it says what transformers returns beside tokens"
_TOKENS = "prompts begin as the tokenizer's files say, and rows are not padded"
_NOTE = "a note of the program that wrote the file"
IGNORED: Mapping[str, str] = {
    "max_length": _REQUEST,
    "max_new_tokens": _REQUEST,
    "num_return_sequences": _REQUEST,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "renormalize_logits": "probabilities always add up to 1",
    "remove_invalid_values": "logits that are no numbers fail the request",
    "low_memory": _HOW,
    "use_cache": _HOW,
    "cache_implementation": _HOW,
    "cache_config": _HOW,
    "max_cache_len": _HOW,
    "compile_config": _HOW,
    "disable_compile": _HOW,
    "continuous_batching_config": _HOW,
    "prefill_chunk_size": _HOW,
    "use_mtp": _SPECULATION,
    "is_assistant": _SPECULATION,
    "num_assistant_tokens": _SPECULATION,
    "num_assistant_tokens_schedule": _SPECULATION,
    "assistant_confidence_threshold": _SPECULATION,
    "prompt_lookup_num_tokens": _SPECULATION,
    "max_matching_ngram_size": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
    "assistant_lookbehind": _SPECULATION,
    "target_lookbehind": _SPECULATION,
    "assistant_ensemble_weight": _SPECULATION,
    "speculation_type": _SPECULATION,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_scores": _OUTPUTS,
    "output_logits": _OUTPUTS,
    "return_dict_in_generate": _OUTPUTS,
    "pad_token_id": _TOKENS,
    "bos_token_id": _TOKENS,
    "decoder_start_token_id": _TOKENS,
    "generation_kwargs": _NOTE,
    "trust_remote_code": "code of a checkpoint is not run",
    "transformers_version": _NOTE,
    "_from_model_config": _NOTE,
    "_commit_hash": _NOTE,
}


def default_sampling(path: Path, generation: Mapping[str, Any]) -> dict[str, float]:
    """What the model's authors sample with. A greedy configuration says nothing of how a token is
    drawn; its repetition_penalty counts all the same. Raises ModelError for values that are not
    known."""
    found: dict[str, float] = {}
    for key, (is_allowed, words) in SAMPLING.items():
        value = generation.get(key)
        if value is None or (key in _OF_SAMPLING and generation.get("do_sample") is False):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not is_allowed(value):
            raise ModelError(f"{path}: {key}={repr(value)[:100]} is not known; allowed: {words}")
        found[key] = max(value, 0) if key == "top_k" else value
    return found


def token_ids(path: Path, value: object) -> list[int]:
    """The ids of an `eos_token_id`, without repetitions; none for null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_TOKEN_IDS or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _LARGEST_ID for i in ids
    ):
        raise ModelError(
            f"{path}: eos_token_id={repr(value)[:100]} is not known; allowed: a token id, or a "
            f"list of up to {MAX_TOKEN_IDS} of them"
        )
    return list(dict.fromkeys(ids))


def generation_warnings(path: Path, generation: Mapping[str, Any]) -> list[str]:
    """What a user should know of a generation config: keys that are set and not applied."""
    ignored = [
        f"{key}={str(generation[key])[:40]}"
        for key, allowed in NEUTRAL.items()
        if key in generation and generation[key] not in allowed
    ]
    known = READ | NEUTRAL.keys() | IGNORED.keys()
    ignored += [
        str(key)[:40]
        for key, value in sorted(generation.items())
        if key not in known and value is not None
    ]
    if not ignored:
        return []
    shown = ", ".join(ignored[:10]) + (", ..." if len(ignored) > 10 else "")
    return [f"{path.name} sets what is not supported and is ignored: {shown}"]
