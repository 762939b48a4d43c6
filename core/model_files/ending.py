"""The one set of tokens that ends an answer, and how answers are sampled, out of a folder's files.

generation_config.json names the ids, or else config.json; the end-of-text token of the tokenizer
always counts besides, as in vLLM, and so does a token that ends turns in the chat template. Knows
nothing of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.disk.plain_files import MAX_TEMPLATE_BYTES, read_json, read_plain
from core.model_files.generation import default_sampling, generation_warnings, token_ids
from core.model_files.tokenizer_settings import check_settings, setting_warnings, token_text
from core.model_files.vocabulary import Vocabulary, read_vocabulary

# Texts of tokens that end a turn, and of those that end a text: llama.cpp's list (llama-vocab.cpp,
# special_eog_ids) without those of filling in the middle. Files nearly always say which one ends a
# text, so that its text counts only where nothing is said.
TURN_ENDS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<turn|>",
        "<|tool_response>", "[e~[",
    }
)  # fmt: skip
TEXT_ENDS = frozenset(
    {
        "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip
NO_END = (
    "no token is known to end an answer, so that all run to their max_tokens; set {where} to the "
    "id of the model's end-of-turn token"
)


@dataclass(frozen=True, slots=True)
class Ending:
    """When answers end, and what they are sampled with where a request does not say."""

    eos_ids: list[int]
    default_sampling: dict[str, float]
    warnings: list[str]


def read_ending(folder: Path, config: Mapping[str, Any]) -> Ending:
    """Read generation_config.json and the tokenizer's files, which are all optional.
    `config` is the contents of config.json. Raises ModelError that names file and key."""
    generation_path = folder / "generation_config.json"
    generation = _optional(generation_path)
    named = token_ids(generation_path, generation.get("eos_token_id"))
    named = named or token_ids(folder / "config.json", config.get("eos_token_id"))
    tokenizer_path = folder / "tokenizer.json"
    has_vocabulary = tokenizer_path.exists()  # else a plugin's tokenizer knows the tokens
    vocabulary = read_vocabulary(tokenizer_path) if has_vocabulary else Vocabulary({}, frozenset())
    settings_path = folder / "tokenizer_config.json"
    map_path = folder / "special_tokens_map.json"
    settings, tokens_map = _optional(settings_path), _optional(map_path)
    check_settings(settings_path, settings)
    eos = token_text(settings_path, settings, "eos_token")
    if "eos_token" not in settings:
        eos = token_text(map_path, tokens_map, "eos_token")
    turns = _turn_ends(folder, settings, vocabulary)
    eos_ids = list(dict.fromkeys([*named, *_ids(vocabulary.ids, eos), *turns]))
    warnings = generation_warnings(generation_path, generation)
    if has_vocabulary:
        warnings += setting_warnings(settings_path, settings, vocabulary)
    if not eos_ids:
        warnings.append(NO_END.format(where="eos_token_id in generation_config.json"))
    return Ending(eos_ids, default_sampling(generation_path, generation), warnings)


def _optional(path: Path) -> dict[str, Any]:
    """The object in a file that may be absent."""
    return read_json(path) if path.exists() else {}


def _turn_ends(folder: Path, settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[int]:
    """Added tokens that are known to end a turn and that the chat template writes: fine-tuned
    models learn them, and files often name but the end of text that the base model had."""
    template = str(settings.get("chat_template") or "")
    template += str(_optional(folder / "chat_template.json").get("chat_template") or "")
    file = folder / "chat_template.jinja"
    if file.exists():
        template += read_plain(file, MAX_TEMPLATE_BYTES).decode(errors="replace")
    texts = sorted(text for text in TURN_ENDS & vocabulary.added if text in template)
    return [vocabulary.ids[text] for text in texts]


def _ids(ids: Mapping[str, int], text: str | None) -> list[int]:
    return [ids[text]] if text is not None and text in ids else []
