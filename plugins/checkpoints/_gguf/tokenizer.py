"""tokenizer.json and tokenizer_config.json out of a GGUF file's metadata, kept in the cache.

Splitting, normalising and merging follow the tokenizer.json that each family publishes, which
GGUF files name by `tokenizer.ggml.pre`. Knows nothing of how text is tokenized in the end.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from core.disk.cache import cache_dir, publish_dir
from core.errors import ModelError
from core.model_files.tokenizer_json import (
    BYTE_LEVEL_DECODER,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    added_token,
    bpe_model,
    byte_alphabet,
    byte_level_split,
    digit_split,
    regex_split,
    template_processor,
    tokenizer_json,
)
from plugins.checkpoints._gguf.header import GGUFFile
from plugins.checkpoints._gguf.tokens import GGUFTokens, read_tokens

_FORMAT_VERSION = "3"  # of the files written: raise it where their contents change
_NFC = {"type": "NFC"}
_UNDERLINE = "\u2581"  # SentencePiece's space


@dataclass(frozen=True, slots=True)
class _ByteLevelKind:
    """What vocabularies of one `tokenizer.ggml.pre` have in common."""

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False  # where the file does not say


_GPT2 = _ByteLevelKind(byte_level_split(use_regex=True))
_LLAMA3 = _ByteLevelKind(regex_split(LLAMA3_SPLIT), ignore_merges=True, adds_bos=True)
_QWEN2 = _ByteLevelKind(regex_split(QWEN2_SPLIT), normalizer=_NFC)
_BYTE_LEVEL_KINDS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _ByteLevelKind(digit_split()),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _ByteLevelKind(regex_split(TEKKEN_SPLIT), ignore_merges=True, adds_bos=True),
}


# By what a file says of its model, where it doesn't say how text is split: files of before 2024.
_KINDS_BY_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2"}
_LLAMA3_TOKENS = 128_256
_TEMPLATE = "tokenizer.chat_template"


def gguf_tokenizer_dir(file: GGUFFile) -> Path:
    """A folder of the cache with the tokenizer's files, written where it is missing."""
    state = os.stat(file.path)
    identity = (
        f"{_FORMAT_VERSION}:{os.path.realpath(file.path)}:{state.st_size}:{state.st_mtime_ns}"
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = cache_dir("tokenizers") / f"gguf-{key}"
    if not folder.is_dir():
        tokens = read_tokens(file)
        tokenizer, adds_bos = _tokenizer(file, tokens)
        config = msgspec.json.encode(_tokenizer_config(file, tokens, adds_bos))
        publish_dir(folder, {"tokenizer.json": tokenizer, "tokenizer_config.json": config})
    return folder


def splitting_warnings(file: GGUFFile) -> list[str]:
    """What a user should know of how this file's text is split."""
    if file.text("tokenizer.ggml.model") != "gpt2" or "tokenizer.ggml.pre" in file.metadata:
        return []
    return [
        f"{file.path} lacks metadata tokenizer.ggml.pre, which says how text is split: "
        f"{_pre(file)!r} is taken, and text is tokenized wrongly if that is not the model's; "
        "convert the file anew"
    ]


def _pre(file: GGUFFile) -> str:
    """How text is split before merges, in llama.cpp's words."""
    pre = file.text("tokenizer.ggml.pre", "")
    if pre:
        return pre
    architecture = file.text("general.architecture", "")
    if architecture == "llama" and len(file.metadata["tokenizer.ggml.tokens"]) == _LLAMA3_TOKENS:
        return "llama-bpe"
    return _KINDS_BY_ARCHITECTURE.get(architecture, "default")


def _tokenizer(file: GGUFFile, tokens: GGUFTokens) -> tuple[bytes, bool]:
    """tokenizer.json, and whether a text starts with the bos token."""
    builders: dict[str, Callable[[GGUFFile, GGUFTokens], tuple[bytes, bool]]] = {
        "gpt2": _byte_level_tokenizer,
        "llama": _sentencepiece_tokenizer,
    }
    kind = file.text("tokenizer.ggml.model")
    if kind not in builders:
        raise ModelError(
            f"{file.path}: metadata tokenizer.ggml.model={kind!r} is not supported; allowed: "
            + ", ".join(builders)
        )
    return builders[kind](file, tokens)


def _byte_level_tokenizer(file: GGUFFile, tokens: GGUFTokens) -> tuple[bytes, bool]:
    pre = _pre(file)
    if pre not in _BYTE_LEVEL_KINDS:
        raise ModelError(
            f"{file.path}: metadata tokenizer.ggml.pre={pre!r} is not supported; allowed: "
            + ", ".join(_BYTE_LEVEL_KINDS)
        )
    kind = _BYTE_LEVEL_KINDS[pre]
    whole = tokens.special | tokens.user_defined
    alphabet = byte_alphabet()
    letters = set(alphabet)
    vocab = {
        # Some converters store ordinary tokens as text instead of in the byte alphabet.
        text
        if token_id in whole or letters.issuperset(text)
        else "".join(alphabet[byte] for byte in text.encode()): token_id
        for token_id, text in enumerate(tokens.texts)
    }
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", kind.adds_bos)
    return tokenizer_json(
        model=bpe_model(vocab, _stored_merges(file, vocab), ignore_merges=kind.ignore_merges),
        decoder=BYTE_LEVEL_DECODER,
        added_tokens=_added_tokens(tokens),
        normalizer=kind.normalizer,
        pre_tokenizer=kind.pre_tokenizer,
        post_processor=_post_processor(file, tokens, adds_bos),
    ), adds_bos


def _sentencepiece_tokenizer(file: GGUFFile, tokens: GGUFTokens) -> tuple[bytes, bool]:
    vocab = {text: token_id for token_id, text in enumerate(tokens.texts)}
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _stored_merges(file, vocab)
    else:
        merges = _merges_by_score(file, vocab, tokens.texts)
    adds_space = file.flag("tokenizer.ggml.add_space_prefix", True)
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", True)
    # A space goes before the text and after each special token, whatever follows there.
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERLINE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _UNDERLINE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": _UNDERLINE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return tokenizer_json(
        model=bpe_model(vocab, merges, sentencepiece=True),
        decoder={"type": "Sequence", "decoders": decoders},
        added_tokens=_added_tokens(tokens),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=_post_processor(file, tokens, adds_bos),
    ), adds_bos


def _added_tokens(tokens: GGUFTokens) -> list[dict[str, Any]]:
    """Control tokens and the unknown one (special: they have no text), and user-defined ones,
    which are never cut into pieces."""
    return [
        added_token(token_id, tokens.texts[token_id], special=token_id in tokens.special)
        for token_id in sorted(tokens.special | tokens.user_defined)
    ]


def _stored_merges(file: GGUFFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in file.sequence("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(
                f"{file.path}: tokenizer.ggml.merges has {merge!r}, whose parts or result are not "
                "tokens; fetch the file again"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(
    file: GGUFFile, vocab: dict[str, int], tokens: list[str]
) -> list[tuple[str, str]]:
    """The merges a SentencePiece vocabulary implies: every way to split each token, best first."""
    scores = file.sequence("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ModelError(
            f"{file.path}: {len(scores)} scores for {len(tokens)} tokens; fetch the file again"
        )
    found = []
    for text, score in zip(tokens, scores, strict=True):
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, left, right) for left, right in known]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _post_processor(file: GGUFFile, tokens: GGUFTokens, adds_bos: bool) -> Any:
    def token(kind: str, wanted: bool) -> tuple[str, int] | None:
        token_id = tokens.ids.get(kind) if wanted else None
        return None if token_id is None else (tokens.texts[token_id], token_id)

    adds_eos = file.flag("tokenizer.ggml.add_eos_token", False)
    return template_processor(token("bos", adds_bos), token("eos", adds_eos))


def _tokenizer_config(file: GGUFFile, tokens: GGUFTokens, adds_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": file.flag("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, kind in kinds.items():
        if kind in tokens.ids:
            config[f"{name}_token"] = tokens.texts[tokens.ids[kind]]
    templates = _chat_templates(file)
    if templates:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    return config


def _chat_templates(file: GGUFFile) -> dict[str, str]:
    """Templates by name: one alone is "default", as is the one whose key has no name."""
    named = {
        key.removeprefix(f"{_TEMPLATE}."): file.text(key)
        for key in file.metadata
        if key.startswith(f"{_TEMPLATE}.")
    }
    if _TEMPLATE in file.metadata:
        named["default"] = file.text(_TEMPLATE)
    return named
