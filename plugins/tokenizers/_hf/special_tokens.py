"""What a tokenizer_config.json changes of the tokenizer that tokenizer.json builds.

Which tokens are special, and what goes around a text. For some classes of tokenizers
`add_bos_token` and `add_eos_token` count before tokenizer.json's own post-processor, as they did in
transformers 4, through which models of such files were trained (DeepSeek's add no bos token but by
the flag); version 5 and other classes leave them unread. Knows nothing of files.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from core.model_files.tokenizer_settings import EXTRA_TOKENS

_PROBE = "a"
# Class of tokenizers in transformers 4 that makes its post-processor of the flags -> what it means
# by saying nothing: `add_bos_token`, and the texts of bos and eos.
_FLAG_CLASSES = {
    "Llama": (True, "<s>", "</s>"),
    "CodeLlama": (True, "<s>", "</s>"),
    "Gemma": (True, "<bos>", "<eos>"),
    "Cohere": (True, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "GPTNeoX": (False, "<|endoftext|>", "<|endoftext|>"),
}


def apply_settings(
    backend: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Change `backend` to what the config says. `special_tokens`: texts by name, as "bos_token".
    May raise whatever the library does (plugins.tokenizers._hf.panics)."""
    _mark_special(backend, [*special_tokens.values(), *_extra_tokens(config)])
    if config.get("split_special_tokens"):
        backend.encode_special_tokens = True
    _surround(backend, config, special_tokens)


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    """Tokens that are special without a role; `check_settings` has seen them."""
    entries: list[Any] = []
    for key in EXTRA_TOKENS:
        value = config.get(key) or []
        entries += value.values() if isinstance(value, dict) else value
    return [entry["content"] if isinstance(entry, dict) else entry for entry in entries]


def _mark_special(backend: Tokenizer, texts: list[str]) -> None:
    """Tokens of the vocabulary that are named as special are found in text, and left out of
    answers. Tokens that tokenizer.json adds stay as it says, as in transformers; names of tokens
    that are not there get no new id: the model has no row for one."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missed = [
        AddedToken(text, special=True, normalized=False)
        for text in dict.fromkeys(texts)
        if text and text not in known and backend.token_to_id(text) is not None
    ]
    if missed:
        backend.add_special_tokens(missed)


def _surround(
    backend: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Put the bos and eos tokens around a text, or leave them away, where the config says so."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")
    if name not in _FLAG_CLASSES:
        return
    prefix, suffix = _around(backend)
    adds_bos, bos, eos = _FLAG_CLASSES[name]
    if config.get("add_bos_token") is not None:
        adds_bos = config["add_bos_token"]
    before = _with(backend, adds_bos, special_tokens.get("bos_token", bos), prefix)
    adds_eos = bool(config.get("add_eos_token"))
    after = _with(backend, adds_eos, special_tokens.get("eos_token", eos), suffix)
    if (before, after) == (prefix, suffix):
        return
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )
    backend.post_processor = template


def _with(backend: Tokenizer, wanted: bool, token: str | None, around: list[str]) -> list[str]:
    """The tokens on one side of a text, with or without one of them."""
    if token is None or backend.token_to_id(token) is None:
        return around
    if not wanted:
        return [each for each in around if each != token]
    return around if token in around else [token, *around]


def _around(backend: Tokenizer) -> tuple[list[str], list[str]]:
    """What the tokenizer puts before and after a text."""
    plain = backend.encode(_PROBE, add_special_tokens=False).tokens
    whole = backend.encode(_PROBE).tokens
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
