"""Every key of a config.json is applied, refused or warned of: the tables that say which.

A family names the keys that its `parse` reads; what no table has is reported as unknown, so that
nothing of a checkpoint is lost without a word. Knows nothing of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import ModelKeyError
from core.layers.basic.config_reader import shown

# Read for every family: by `parse_decoder`, by the loading of files, or by whoever picks a family.
READ = frozenset(
    {
        "architectures", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
        "intermediate_size", "layer_types", "max_position_embeddings", "model_type",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "original_max_position_embeddings", "partial_rotary_factor", "quantization_config",
        "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
        "torch_dtype", "vocab_size",
    }
)  # fmt: skip

# Keys that would change what is computed, and the only values that do not.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (None, False),
    "rope_interleaved": (None, False),  # of nanotron: neighbouring dimensions form a pair
}

_TRAINING = "only training reads it"
_OUTPUTS = "it says what transformers returns beside logits"
_HOW = "it chooses how transformers computes, not what"
_LABELS = "it describes classifiers"
_NOTE = "a note of the program that wrote the file"
_SAMPLING = "transformers reads sampling defaults from generation_config.json, and so do we"
IGNORED: Mapping[str, str] = {
    "attention_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "use_cache": _HOW,
    "pretraining_tp": _HOW,
    "chunk_size_feed_forward": _HOW,
    "attn_implementation": _HOW,
    "_attn_implementation": _HOW,
    "_attn_implementation_internal": _HOW,
    "_attn_implementation_autoset": _HOW,
    "experts_implementation": _HOW,
    "_experts_implementation": _HOW,
    "_experts_implementation_internal": _HOW,
    "output_hidden_states": _OUTPUTS,
    "output_attentions": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "tie_last_hidden_states": _OUTPUTS,
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": _LABELS,
    "problem_type": _LABELS,
    "bos_token_id": "the tokenizer's files say what a text begins with",
    "pad_token_id": "rows are not padded",
    "transformers_version": _NOTE,
    "name_or_path": _NOTE,
    "_name_or_path": _NOTE,
    "_commit_hash": _NOTE,
    "_from_model_config": _NOTE,
    "transformers.js_config": _NOTE,
    "is_llama_config": _NOTE,
    "unsloth_version": _NOTE,
    "unsloth_fixed": _NOTE,
    **dict.fromkeys(
        (
            "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping",
            "max_time", "stop_strings", "do_sample", "num_beams", "num_beam_groups", "temperature",
            "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
            "diversity_penalty", "repetition_penalty", "encoder_repetition_penalty",
            "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
            "bad_words_ids", "force_words_ids", "renormalize_logits", "constraints",
            "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
            "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
            "sequence_bias", "token_healing", "guidance_scale", "low_memory",
            "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
            "use_mtp", "num_assistant_tokens", "num_assistant_tokens_schedule",
            "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
            "target_lookbehind", "max_matching_ngram_size", "penalty_alpha", "dola_layers",
            "prompt_lookup_num_tokens", "prefill_chunk_size",
        ),
        _SAMPLING,
    ),
}  # fmt: skip
# Keys for which null says something else than their absence.
_NULL_SPEAKS = frozenset(
    {
        "num_key_value_heads", "sliding_window", "q_lora_rank", "n_shared_experts",
        "partial_rotary_factor",
    }
)  # fmt: skip
_MAX_SHOWN = 10  # unknown keys in one warning


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKeys:
    """What one family does with the keys that are not the same for all."""

    model_type: str  # what its own checkpoints say
    read: frozenset[str]  # beside READ
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys a config.json may lack
    aliases: Mapping[str, str] = field(default_factory=dict)  # second name -> the one read here
    ignored: Mapping[str, str] = field(default_factory=dict)  # key -> why; beside IGNORED
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # beside NEUTRAL

    def complete(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with the family's defaults, under the names that are read. Raises ModelError
        for keys that would change what is computed and are not supported."""
        config = dict(hf_config)
        for alias, key in self.aliases.items():
            value = config.pop(alias, None)
            if value is None:
                continue
            if config.get(key) not in (None, value):
                raise ModelKeyError(
                    key, f"={shown(config[key])} and {alias}={shown(value)} contradict each other"
                )
            config[key] = value
        for key, default in self.defaults.items():
            if key not in config or (config[key] is None and key not in _NULL_SPEAKS):
                config[key] = default
        if "num_key_value_heads" not in hf_config and not _divides(config):
            config["num_key_value_heads"] = None  # not what this file means: as many as there are
        for key, allowed in {**NEUTRAL, **self.neutral}.items():
            if key in config and config[key] not in allowed:
                needed = " or ".join(dict.fromkeys(map(_json_text, allowed)))
                raise ModelKeyError(
                    key, f"={shown(config[key])} is not supported; allowed: {needed}"
                )
        return config

    def warnings(self, hf_config: Mapping[str, Any]) -> list[str]:
        """What a user should know of a config that is served."""
        found = []
        model_type = hf_config.get("model_type")
        if model_type not in (None, self.model_type):
            found.append(
                f"config.json: model_type={shown(model_type)} is served as {self.model_type!r}, as "
                "architectures says"
            )
        known = READ | self.read | NEUTRAL.keys() | self.neutral.keys() | IGNORED.keys()
        known |= self.aliases.keys() | self.ignored.keys() | {"auto_map"}
        unknown = sorted(
            key for key, value in hf_config.items() if key not in known and value is not None
        )
        if unknown:
            names = ", ".join(shown(name)[1:-1] for name in unknown[:_MAX_SHOWN])
            rest = ", ..." if len(unknown) > _MAX_SHOWN else ""
            found.append(
                f"config.json has keys that {self.model_type!r} models don't have, which are "
                f"ignored: {names}{rest}"
            )
        return found


def _divides(config: Mapping[str, Any]) -> bool:
    """Whether the default number of KV heads is one that the model can have."""
    num_heads, num_kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int) or num_kv_heads < 1:
        return False
    return num_heads % num_kv_heads == 0


def _json_text(value: object) -> str:
    return "null" if value is None else str(value).lower()
