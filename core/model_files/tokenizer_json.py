"""The pieces of a tokenizer.json (the format of Hugging Face tokenizers), as plain data.

Knows nothing of where a vocabulary comes from. Importing this imports no tokenizer library.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

# How text is split before byte-pair merges, by family of vocabulary; as in the tokenizer.json of
# Llama 3, Qwen2 and Mistral Nemo.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    alphabet |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]


def byte_level_split(*, use_regex: bool) -> dict[str, Any]:
    """Text to the byte alphabet; with GPT-2's own splitting if `use_regex`."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def regex_split(regex: str) -> dict[str, Any]:
    """Pieces that match a regular expression, then the byte alphabet."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            },
            byte_level_split(use_regex=False),
        ],
    }


def digit_split() -> dict[str, Any]:
    """Every digit alone, then GPT-2's splitting."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            byte_level_split(use_regex=True),
        ],
    }


def bpe_model(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    sentencepiece: bool = False,
) -> dict[str, Any]:
    """A byte-pair model; `sentencepiece`: unknown characters fall back to byte tokens."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": sentencepiece,
        "byte_fallback": sentencepiece,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """A token that is found in text before anything is split."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def template_processor(prefix: tuple[str, int] | None, suffix: tuple[str, int] | None) -> Any:
    """Puts special tokens around a text; None where there are none."""
    around = [token for token in (prefix, suffix) if token is not None]
    if not around:
        return None

    def sequence(kind: str) -> list[Any]:
        text = {"Sequence": {"id": kind, "type_id": 0}}
        before = [{"SpecialToken": {"id": prefix[0], "type_id": 0}}] if prefix else []
        after = [{"SpecialToken": {"id": suffix[0], "type_id": 0}}] if suffix else []
        return [*before, text, *after]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": sequence("A") + sequence("B"),
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]} for text, token_id in around
        },
    }


def tokenizer_json(
    *,
    model: dict[str, Any],
    decoder: dict[str, Any],
    added_tokens: Sequence[dict[str, Any]],
    pre_tokenizer: dict[str, Any] | None,
    normalizer: dict[str, Any] | None = None,
    post_processor: Any = None,
) -> bytes:
    """A whole tokenizer.json."""
    return msgspec.json.encode(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor,
            "decoder": decoder,
            "model": model,
        }
    )
