"""Tokenizers built from GGUF metadata against transformers' own, made from the same files."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from core.errors import ModelError
from core.model_files.tokenizer_json import byte_alphabet
from plugins.checkpoints._gguf.header import GGUFFile, read_gguf
from plugins.checkpoints._gguf.tokenizer import gguf_tokenizer_dir
from tests.support import smollm2

TEXTS = [
    "The capital of France is Paris.",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]\n\n\tif x != 3: pass",
    "1234567890 3.14159 2024-01-01, 50% of 1,000,000",
    "I'm sure they'll say we've won; it's John's. DON'T!",
    "  leading, trailing  and   many\n\n\n newlines \t tabs  ",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and accents: naïve café Ærøskøbing",
    "中文分词测试,日本語のテキスト、한국어 문장",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_start|> x",
    "\u202eright to left\u202c \u0000 \x07 control",
    "",
    " ",
]


@pytest.fixture(scope="module")
def smollm2_gguf() -> GGUFFile:
    return read_gguf(smollm2.files().weight_files[0])


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: GGUFFile) -> Any:
    return transformers_tokenizer(Path(smollm2_gguf.path))


@pytest.fixture(scope="module")
def smollm2_dir(smollm2_gguf: GGUFFile) -> Path:
    return gguf_tokenizer_dir(smollm2_gguf)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_and_text_are_those_of_transformers(
    smollm2_dir: Path, theirs: Any, text: str
) -> None:
    ours = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    expected = theirs.encode(text)
    assert ours.encode(text).ids == expected
    assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)


def test_smollm2_keeps_digits_apart_even_after_spaces(smollm2_dir: Path, theirs: Any) -> None:
    """As the model was trained. transformers, from a GGUF, splits as GPT-2 did: that differs
    where several spaces stand before a digit."""
    ours = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    tokens = ours.encode("x   12").tokens
    assert tokens == ["x", "ĠĠĠ", "1", "2"]
    assert theirs.tokenize("x   12") == ["x", "ĠĠ", "Ġ", "1", "2"]


def test_smollm2_chat_template_and_special_tokens(smollm2_dir: Path, theirs: Any) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [{"role": "user", "content": "hi"}]
    rendered = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    ids = ours.encode(rendered)
    assert ids[0] == 1  # <|im_start|>, and no second bos
    assert ids == theirs.encode(rendered)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)


def trained_bpe(texts: list[str], pre_tokenizer: Any) -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level vocabulary."""
    import json

    from tokenizers import models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=byte_alphabet()
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def write_vocabulary(
    path: Path, kind: str, tokens: list[str], types: list[int], **metadata: Any
) -> GGUFFile:
    """A GGUF file with a tokenizer and a model just large enough for transformers to read it."""
    import numpy as np
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType

    writer = GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", 1),
        ("context_length", 8),
        ("embedding_length", 8),
        ("attention.head_count", 2),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in metadata.items():
        kind_of = GGUFValueType.UINT32 if key.endswith("_id") else GGUFValueType.get_type(value)
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, kind_of)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(str(path))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "default"])
def test_byte_level_vocabularies(own_cache: Path, tmp_path: Path, pre: str) -> None:
    from tokenizers import pre_tokenizers

    tokens, merges = trained_bpe(TEXTS, pre_tokenizers.ByteLevel(add_prefix_space=False))
    types = [1] * len(tokens) + [3, 3, 4, 3]
    # transformers takes <|endoftext|> to be there, in every byte-level vocabulary.
    tokens = [*tokens, "<|im_start|>", "<|im_end|>", "<think>", "<|endoftext|>"]
    end = len(tokens) - 3
    file = write_vocabulary(
        tmp_path / "v.gguf", "gpt2", tokens, types, pre=pre, merges=merges, eos_token_id=end
    )
    path = gguf_tokenizer_dir(file) / "tokenizer.json"
    ours, theirs = Tokenizer.from_file(str(path)), transformers_tokenizer(tmp_path / "v.gguf")
    for text in [*TEXTS, "a<think>b</think>"]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(
            text, add_special_tokens=False
        )
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


PIECES = ["\u2581the", "\u2581t", "he", "th", "\u2581c", "at", "\u2581cat", "in", "\u2581in"]
PIECES += ["\u2581\u2581", "\u2581\u2581\u2581"]


def sentencepiece_file(path: Path, **metadata: Any) -> GGUFFile:
    letters = [*"\u2581abcdefghijklmnopqrstuvwxyz.,"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *PIECES, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) + len(letters))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) + len(letters))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_vocabulary(path, "llama", tokens, types, scores=scores, **(ids | metadata))


def test_sentencepiece_vocabulary(own_cache: Path, tmp_path: Path) -> None:
    file = sentencepiece_file(tmp_path / "v.gguf")
    path = gguf_tokenizer_dir(file) / "tokenizer.json"
    ours, theirs = Tokenizer.from_file(str(path)), transformers_tokenizer(tmp_path / "v.gguf")
    for text in ["the cat in", "the  cat.", "é中\U0001f600 the", "x</s>", "a\nb", ""]:
        expected = theirs.encode(text)
        assert expected[0] == 1
        assert ours.encode(text).ids == expected
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    cat = ours.encode("cat", add_special_tokens=False).ids
    assert ours.decode([0, *cat, 0]) == theirs.decode([0, *cat, 0], skip_special_tokens=True)
    assert ours.decode([0, *cat, 0]) == "cat", "the unknown token has no text"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (" the cat", ["\u2581", "\u2581the", "\u2581cat"]),
        ("  ", ["\u2581\u2581\u2581"]),
        ("<s>the</s>cat", ["<s>", "\u2581the", "</s>", "\u2581cat"]),
        ("<s> the", ["<s>", "\u2581", "\u2581the"]),
        ("", []),
    ],
)
def test_a_space_goes_before_a_text_and_after_each_special_token(
    own_cache: Path, tmp_path: Path, text: str, tokens: list[str]
) -> None:
    """As llama.cpp has it, whatever the text begins with. Its 47 published vectors of Llama 2's
    vocabulary (ggml-vocab-llama-spm) come out right in this way."""
    file = sentencepiece_file(tmp_path / "v.gguf")
    ours = Tokenizer.from_file(str(gguf_tokenizer_dir(file) / "tokenizer.json"))
    assert ours.encode(text, add_special_tokens=False).tokens == tokens


def test_no_space_is_added_where_the_file_says_so(own_cache: Path, tmp_path: Path) -> None:
    file = sentencepiece_file(tmp_path / "v.gguf", add_space_prefix=False)
    ours = Tokenizer.from_file(str(gguf_tokenizer_dir(file) / "tokenizer.json"))
    assert ours.encode("cat in", add_special_tokens=False).tokens == ["c", "at", "\u2581in"]
    assert ours.decode(ours.encode(" cat").ids) == " cat"


def test_bos_and_eos_are_added_where_the_file_says_so(own_cache: Path, tmp_path: Path) -> None:
    tokens, types = [*byte_alphabet(), "<s>", "</s>"], [1] * 256 + [3, 3]
    common: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 257, "merges": ["a b"]}
    tokens, types = [*tokens, "ab"], [*types, 1]
    cases = [
        ({"pre": "default"}, [], []),
        ({"pre": "default", "add_bos_token": True}, [256], []),
        ({"pre": "default", "add_bos_token": True, "add_eos_token": True}, [256], [257]),
        ({"pre": "llama-bpe"}, [256], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ]
    for index, (metadata, before, after) in enumerate(cases):
        path = tmp_path / f"{index}.gguf"
        file = write_vocabulary(path, "gpt2", tokens, types, **common, **metadata)
        ours = Tokenizer.from_file(str(gguf_tokenizer_dir(file) / "tokenizer.json"))
        assert ours.encode("ab").ids == [*before, 258, *after]
        assert ours.encode("ab", add_special_tokens=False).ids == [258]


def test_the_cache_follows_the_file(own_cache: Path, tmp_path: Path) -> None:
    tokens, types = [*byte_alphabet(), "ab"], [1] * 257
    path = tmp_path / "v.gguf"
    first = gguf_tokenizer_dir(
        write_vocabulary(path, "gpt2", tokens, types, merges=["a b"], eos_token_id=0)
    )
    assert gguf_tokenizer_dir(read_gguf(str(path))) == first
    second = gguf_tokenizer_dir(
        write_vocabulary(path, "gpt2", [*tokens, "cd"], [*types, 1], merges=["a b", "c d"])
    )
    assert second != first
    assert sorted(p.name for p in second.parent.iterdir()) == sorted([first.name, second.name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, ["tokenizer.ggml.model='rwkv'", "gpt2, llama"]),
        ({"tokenizer.ggml.pre": "odd"}, ["tokenizer.ggml.pre='odd'", "qwen2"]),
        ({"tokenizer.ggml.tokens": None}, ["tokenizer.ggml.tokens is missing"]),
        ({"tokenizer.ggml.tokens": [1, 2]}, ["tokenizer.ggml.tokens must be an array of str"]),
        ({"tokenizer.ggml.token_type": [1]}, ["1 token types for 257 tokens"]),
        ({"tokenizer.ggml.merges": ["x yz"]}, ["'x yz'"]),
        ({"tokenizer.ggml.merges": ["xy"]}, ["'xy'"]),
        ({"tokenizer.ggml.eos_token_id": 999}, ["eos_token_id=999", "257 tokens"]),
        ({"tokenizer.ggml.eos_token_id": 2**32 - 1}, ["eos_token_id=4294967295", "257 tokens"]),
        ({"tokenizer.ggml.tokens": []}, ["tokenizer.ggml.tokens has 0 tokens"]),
        ({"tokenizer.chat_template": 3}, ["tokenizer.chat_template=3", "a string"]),
    ],
)
def test_metadata_that_is_no_tokenizer(
    own_cache: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    file = write_vocabulary(
        tmp_path / "v.gguf", "gpt2", [*byte_alphabet(), "ab"], [1] * 257, merges=["a b"]
    )
    metadata = {k: v for k, v in (dict(file.metadata) | changes).items() if v is not None}
    with pytest.raises(ModelError) as error:
        gguf_tokenizer_dir(GGUFFile(file.path, metadata, file.tensors))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [257]), ("qwen2", [256, 66])])
def test_llama3_takes_whole_tokens_that_no_merge_leads_to(
    own_cache: Path, tmp_path: Path, pre: str, expected: list[int]
) -> None:
    tokens = [*byte_alphabet(), "ab", "abB"]
    types = [1] * len(tokens)
    file = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, types, pre=pre, merges=["a b"])
    ours = Tokenizer.from_file(str(gguf_tokenizer_dir(file) / "tokenizer.json"))
    assert ours.encode("abB").ids == expected
