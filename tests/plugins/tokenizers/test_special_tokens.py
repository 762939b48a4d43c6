"""What tokenizer_config.json changes, against transformers on tokenizers of each published kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import byte_fallback, byte_level, write_folder

TEXTS = ("Hello", "", "<|im_start|>Paris<|im_end|> is", "<s>Paris</s>", "a <unk> b")
FLAGS: list[dict[str, bool]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": False, "add_eos_token": False},
    {"add_bos_token": False, "add_eos_token": True},
]


def copy_of(tokenizer: Tokenizer, post_processor: Any) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer.to_str())
    if post_processor is not None:
        made.post_processor = post_processor
    return made


def template(tokenizer: Tokenizer, *tokens: str) -> Any:
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    return processors.TemplateProcessing(
        single=f"{tokens[0]} $A", pair=f"{tokens[0]} $A {tokens[0]} $B", special_tokens=ids
    )


# As DeepSeek (bytes, no template), Llama 3 (bytes with one), Mistral and Llama 2 publish them.
KINDS: dict[str, tuple[Tokenizer, dict[str, str]]] = {
    "bytes": (
        copy_of(byte_level(), processors.ByteLevel(trim_offsets=False)),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "bytes with a template": (
        copy_of(
            byte_level(),
            processors.Sequence([processors.ByteLevel(), template(byte_level(), "<|im_start|>")]),
        ),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "pieces with a template": (
        copy_of(byte_fallback(), template(byte_fallback(), "<s>")),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "bytes without a bos": (copy_of(byte_level(), None), {"eos_token": "<|im_end|>"}),
}


def folder_of(path: Path, kind: str, config: dict[str, Any]) -> Path:
    tokenizer, tokens = KINDS[kind]
    folder = write_folder(path, tokenizer, template=None)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_flags_of_other_classes_are_unread_as_in_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for index, flags in enumerate(FLAGS):
        folder = folder_of(tmp_path / str(index), kind, flags)
        theirs = AutoTokenizer.from_pretrained(folder)
        ours = HfTokenizer.from_folder(folder)
        for text in TEXTS:
            assert ours.encode(text) == theirs(text)["input_ids"], (flags, text)
            plain = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, add_special_tokens=False) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_flags_of_llama_tokenizers_count_before_the_post_processor(
    kind: str, tmp_path: Path
) -> None:
    """As LlamaTokenizerFast of transformers 4.57 has it: bos unless it is said not to, eos where it
    is, whatever tokenizer.json adds."""
    tokenizer, tokens = KINDS[kind]
    for index, flags in enumerate(FLAGS):
        folder = folder_of(
            tmp_path / str(index), kind, {"tokenizer_class": "LlamaTokenizerFast"} | flags
        )
        ours = HfTokenizer.from_folder(folder)
        before = (
            [tokens["bos_token"]]
            if flags.get("add_bos_token", True) and "bos_token" in tokens
            else []
        )
        after = [tokens["eos_token"]] if flags.get("add_eos_token", False) else []
        for text in TEXTS:
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            expected = [
                *map(tokenizer.token_to_id, before),
                *plain,
                *map(tokenizer.token_to_id, after),
            ]
            assert ours.encode(text) == expected, (flags, text)
            assert ours.encode(text, add_special_tokens=False) == plain


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_are_named_are_special(key: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    piece = max(byte_level().get_vocab(), key=len)  # plain to tokenizer.json
    named = [piece, "<é tool>", "<|no token|>"]
    folder = folder_of(tmp_path, "bytes", {key: named[:2], "mask_token": "Paris"})
    theirs, ours = AutoTokenizer.from_pretrained(folder), HfTokenizer.from_folder(folder)
    size = byte_level().get_vocab_size()
    assert byte_level().token_to_id("Paris") is None  # so that transformers makes it a new token
    for text in (f"say {piece}, <é tool> hello", piece, "hello world"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert piece not in ours.decode(ids)
    objects = [{"content": name, "__type": "AddedToken"} for name in named]
    tokenizer = HfTokenizer.from_folder(folder_of(tmp_path / "2", "bytes", {key: objects}))
    assert tokenizer.vocab_size == size  # none is new: the model has no row for it
    assert tokenizer.decode(tokenizer.encode(f"a{piece}")) == "a"


def test_special_tokens_may_be_split(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path, "bytes", {"split_special_tokens": True})
    theirs, ours = AutoTokenizer.from_pretrained(folder), HfTokenizer.from_folder(folder)
    text = "<|im_start|>Paris"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert byte_level().token_to_id("<|im_start|>") not in ours.encode(text)
