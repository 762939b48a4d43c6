"""What a tokenizer_config.json says: each key is applied, harmless or warned of.

The plugin of tokenizers in that form applies them; this says which, reads what ends an answer, and
knows nothing of the library that tokenizes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.model_files.vocabulary import Vocabulary

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
READ = frozenset(
    {
        *SPECIAL_TOKENS, *EXTRA_TOKENS, "add_bos_token", "add_eos_token", "split_special_tokens",
        "chat_template", "tokenizer_class",
    }
)  # fmt: skip
# Keys that would change what is tokenized or shown and are not applied; values that change nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "fix_mistral_regex": (None, False),
    "do_lower_case": (None, False),
    "chat_control_tokens": (None, []),
}
_FILE = "tokenizer.json says it"
_CUT = "prompts are neither cut nor padded"
_NOTE = "a note of the program that wrote the file"
IGNORED: Mapping[str, str] = {
    "added_tokens_decoder": "tokenizer.json lists them, and those it lacks are warned of",
    "model_specific_special_tokens": _FILE,
    "add_prefix_space": _FILE,
    "legacy": _FILE,
    "sp_model_kwargs": _FILE,
    "trim_offsets": _FILE,
    "errors": _FILE,
    "normalization": _FILE,
    "use_default_system_prompt": "chat templates say it",
    "clean_up_tokenization_spaces": "transformers doesn't do it for byte-pair vocabularies",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "as its name says",
    "spaces_between_special_tokens": "tokens are shown as they are",
    "model_max_length": "config.json says how long a context is",
    "max_len": "config.json says how long a context is",
    "max_length": _CUT,
    "stride": _CUT,
    "truncation_side": _CUT,
    "truncation_strategy": _CUT,
    "padding_side": _CUT,
    "pad_to_multiple_of": _CUT,
    "pad_token_type_id": _CUT,
    "model_input_names": "there is but one input",
    "response_template": "answers are not parsed by templates",
    "response_schema": "answers are not parsed by schemas",
    "processor_class": _NOTE,
    "auto_map": "code of a checkpoint is not run",
    "name_or_path": _NOTE,
    "tokenizer_file": _NOTE,
    "vocab_file": _NOTE,
    "merges_file": _NOTE,
    "backend": _NOTE,
    "files_loaded": _NOTE,
    "is_local": _NOTE,
    "local_files_only": _NOTE,
    "verbose": _NOTE,
    "transformers_version": _NOTE,
}


def token_text(path: Path, config: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token: a string, or the object that says more about it."""
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ModelError(f"{path}: {name}={repr(value)[:100]} is not known; allowed: a text")
    return text


def check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for values of the wrong type among the keys that are read."""
    for name in SPECIAL_TOKENS:
        token_text(path, config, name)
    for name in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if not isinstance(config.get(name), bool | None):
            raise ModelError(
                f"{path}: {name}={repr(config[name])[:100]} is not known; allowed: true or false"
            )
    for name in EXTRA_TOKENS:
        _check_extra(path, name, config.get(name))
    template = config.get("chat_template")
    is_list = isinstance(template, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in template
    )
    if not is_list and not isinstance(template, str | None):
        raise ModelError(
            f"{path}: chat_template={repr(template)[:100]} is not known; allowed: a text, or a "
            "list of objects with name and template"
        )


def _check_extra(path: Path, name: str, value: object) -> None:
    """Tokens without a role: a list of texts, or an object of them by name."""
    if value is None:
        return
    if not isinstance(value, list | dict):
        raise ModelError(
            f"{path}: {name}={repr(value)[:100]} is not known; allowed: a list of texts, or an "
            "object of them"
        )
    for entry in value.values() if isinstance(value, dict) else value:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ModelError(f"{path}: {name} has {repr(entry)[:100]}; allowed: texts")


def setting_warnings(path: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> list[str]:
    """What a user should know of a tokenizer config."""
    found = []
    ignored = [
        f"{key}={str(config[key])[:40]}"
        for key, allowed in NEUTRAL.items()
        if key in config and config[key] not in allowed
    ]
    if ignored:
        found.append(f"{path.name} sets what is not supported and is ignored: {', '.join(ignored)}")
    eos = token_text(path, config, "eos_token")
    if eos is not None and eos not in vocabulary.ids:
        found.append(
            f"{path.name}: eos_token={eos[:100]!r} is no token of tokenizer.json and ends no answer"
        )
    decoder = config.get("added_tokens_decoder")
    texts = [
        entry["content"]
        for entry in (decoder.values() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    ]
    lost = [text for text in texts if text not in vocabulary.ids]
    if lost:
        shown = ", ".join(repr(text[:40]) for text in lost[:5])
        found.append(
            f"{path.name} has {len(lost)} added tokens that tokenizer.json lacks, which are "
            f"tokenized as other text: {shown}"
        )
    return found
