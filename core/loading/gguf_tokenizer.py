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

from core.errors import ModelError
from core.loading.cache import cache_dir, publish_dir
from core.loading.gguf_header import GGUFFile
from core.loading.tokenizer_json import (
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

_FORMAT_VERSION = "2"  # of the files written: raise it where their contents change
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types
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


def gguf_tokenizer_dir(file: GGUFFile) -> Path:
    """A folder of the cache with the tokenizer's files, written where it is missing."""
    state = os.stat(file.path)
    identity = (
        f"{_FORMAT_VERSION}:{os.path.realpath(file.path)}:{state.st_size}:{state.st_mtime_ns}"
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = cache_dir("tokenizers") / f"gguf-{key}"
    if not folder.is_dir():
        tokenizer, adds_bos = _tokenizer(file)
        config = msgspec.json.encode(_tokenizer_config(file, adds_bos))
        publish_dir(folder, {"tokenizer.json": tokenizer, "tokenizer_config.json": config})
    return folder


def _tokenizer(file: GGUFFile) -> tuple[bytes, bool]:
    """tokenizer.json, and whether a text starts with the bos token."""
    builders: dict[str, Callable[[GGUFFile, list[str]], tuple[bytes, bool]]] = {
        "gpt2": _byte_level_tokenizer,
        "llama": _sentencepiece_tokenizer,
    }
    kind = file.text("tokenizer.ggml.model")
    if kind not in builders:
        raise ModelError(
            f"{file.path}: metadata tokenizer.ggml.model={kind!r} is not supported; allowed: "
            + ", ".join(builders)
        )
    return builders[kind](file, file.sequence("tokenizer.ggml.tokens", str))


def _byte_level_tokenizer(file: GGUFFile, tokens: list[str]) -> tuple[bytes, bool]:
    pre = file.text("tokenizer.ggml.pre", "default")
    if pre not in _BYTE_LEVEL_KINDS:
        raise ModelError(
            f"{file.path}: metadata tokenizer.ggml.pre={pre!r} is not supported; allowed: "
            + ", ".join(_BYTE_LEVEL_KINDS)
        )
    kind = _BYTE_LEVEL_KINDS[pre]
    added = _added_tokens(file, tokens)
    added_ids = {token["id"] for token in added}
    alphabet = byte_alphabet()
    letters = set(alphabet)
    vocab = {
        # Some converters store ordinary tokens as text instead of in the byte alphabet.
        text
        if token_id in added_ids or letters.issuperset(text)
        else "".join(alphabet[byte] for byte in text.encode()): token_id
        for token_id, text in enumerate(tokens)
    }
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", kind.adds_bos)
    return tokenizer_json(
        model=bpe_model(vocab, _stored_merges(file, vocab), ignore_merges=kind.ignore_merges),
        decoder=BYTE_LEVEL_DECODER,
        added_tokens=added,
        normalizer=kind.normalizer,
        pre_tokenizer=kind.pre_tokenizer,
        post_processor=_post_processor(file, tokens, adds_bos),
    ), adds_bos


def _sentencepiece_tokenizer(file: GGUFFile, tokens: list[str]) -> tuple[bytes, bool]:
    vocab = {text: token_id for token_id, text in enumerate(tokens)}
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _stored_merges(file, vocab)
    else:
        merges = _merges_by_score(file, vocab, tokens)
    adds_space = file.flag("tokenizer.ggml.add_space_prefix", True)
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", True)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _UNDERLINE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return tokenizer_json(
        model=bpe_model(vocab, merges, sentencepiece=True),
        decoder={"type": "Sequence", "decoders": decoders},
        added_tokens=_added_tokens(file, tokens),
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": _UNDERLINE,
            "prepend_scheme": "first" if adds_space else "never",
            "split": False,
        },
        post_processor=_post_processor(file, tokens, adds_bos),
    ), adds_bos


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[dict[str, Any]]:
    """Control tokens and the unknown one (special: they have no text), and user-defined ones,
    which are never cut into pieces."""
    if "tokenizer.ggml.token_type" not in file.metadata:
        return []
    types = file.sequence("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ModelError(
            f"{file.path}: {len(types)} token types for {len(tokens)} tokens; fetch the file again"
        )
    return [
        added_token(token_id, text, special=token_type != _USER_DEFINED)
        for token_id, (text, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
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


def _special_id(file: GGUFFile, kind: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    if key not in file.metadata:
        return None
    token_id = file.count(key)
    if not 0 <= token_id < num_tokens:
        raise ModelError(
            f"{file.path}: metadata {key}={token_id} is not one of {num_tokens} tokens"
        )
    return token_id


def _post_processor(file: GGUFFile, tokens: list[str], adds_bos: bool) -> Any:
    def token(kind: str, wanted: bool) -> tuple[str, int] | None:
        token_id = _special_id(file, kind, len(tokens)) if wanted else None
        return None if token_id is None else (tokens[token_id], token_id)

    adds_eos = file.flag("tokenizer.ggml.add_eos_token", False)
    return template_processor(token("bos", adds_bos), token("eos", adds_eos))


def _tokenizer_config(file: GGUFFile, adds_bos: bool) -> dict[str, Any]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": file.flag("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, kind in kinds.items():
        token_id = _special_id(file, kind, len(tokens))
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.text("tokenizer.chat_template")
    return config
