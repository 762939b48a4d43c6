"""Tokenizer and detokenizers against the tokenizers library and transformers."""

import json
import random

import pytest

from core.errors import ModelError, RequestError
from core.interfaces.frontend import Tokenizer as TokenizerProtocol
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import byte_fallback, byte_level, write_folder

TEXTS = (
    "hello world",
    " leading",
    "über größe 日本語 🎉🎊 naïve",
    "a\n\tb  c",
    "",
    "<|im_start|>x<é tool>",
)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return HfTokenizer.from_folder(write_folder(tmp_path_factory.mktemp("byte")))


@pytest.fixture(scope="module")
def fallback_tokenizer(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("fallback"), byte_fallback())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return HfTokenizer.from_folder(folder)


def stream(tokenizer, ids, skip_special_tokens=True):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    pieces = [detokenizer.add([token_id]) for token_id in ids]
    return [*pieces, detokenizer.finish()]


def test_fills_the_protocol(byte_tokenizer):
    tokenizer: TokenizerProtocol = byte_tokenizer
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.eos_ids == (byte_level().token_to_id("<|im_end|>"),)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_transformers(byte_tokenizer, text):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert byte_tokenizer.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_stream_equals_the_whole_decode_for_random_tokens(byte_tokenizer, skip):
    backend = byte_level()
    draw = random.Random(7)
    for _ in range(400):
        ids = [draw.randrange(backend.get_vocab_size()) for _ in range(draw.randrange(1, 40))]
        expected = backend.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(byte_tokenizer, ids, skip)) == expected
        assert byte_tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "fallback"])
def test_no_character_is_cut(request, kind, text):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, skip_special_tokens=False)
    backend = byte_level() if kind == "byte" else byte_fallback()
    assert "".join(pieces) == backend.decode(ids, skip_special_tokens=False)
    assert not any("\ufffd" in piece for piece in pieces)


def test_fallback_stream_equals_the_whole_decode_for_random_pieces(fallback_tokenizer):
    backend = byte_fallback()
    pieces = [i for i in range(backend.get_vocab_size()) if not 3 <= i < 259]
    emoji = backend.encode("🎉").ids[1:]
    draw = random.Random(3)
    for _ in range(200):
        ids = []
        for _ in range(draw.randrange(1, 20)):
            ids += emoji if draw.random() < 0.2 else [draw.choice(pieces)]
        expected = backend.decode(ids, skip_special_tokens=True)
        assert "".join(stream(fallback_tokenizer, ids)) == expected


def test_broken_bytes_of_fallback_come_out_once_they_are_known_to_be_broken(fallback_tokenizer):
    byte = byte_fallback().token_to_id("<0xF0>")
    assert stream(fallback_tokenizer, [byte] * 3) == ["", "\ufffd", "\ufffd", "\ufffd"]


def test_partial_characters_are_held_back(byte_tokenizer):
    ids = [byte_level().token_to_id(piece) for piece in ("ð", "Ł", "İ", "ī")]  # 🎉, byte by byte
    assert stream(byte_tokenizer, ids) == ["", "", "", "🎉", ""]


@pytest.mark.parametrize("kind", ["byte", "fallback"])
def test_token_bytes_join_to_the_text(request, kind):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    ids = tokenizer.encode("The capital of 日本語 is 🎉 Paris")
    joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
    assert joined.removeprefix(" ") == "The capital of 日本語 is 🎉 Paris"
    assert tokenizer.token_text(10**9) == ""


def test_eos_ids_come_from_the_caller_the_generation_config_and_the_eos_token(tmp_path):
    folder = write_folder(tmp_path)
    eos = byte_level().token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert HfTokenizer.from_folder(folder).eos_ids == (0, 5, eos)
    assert HfTokenizer.from_folder(folder, [7, eos]).eos_ids == (7, eos)


def test_templates_are_found_wherever_a_checkpoint_keeps_them(tmp_path):
    folder = write_folder(tmp_path, template=None)
    with pytest.raises(RequestError, match="no chat template"):
        HfTokenizer.from_folder(folder).apply_chat_template([{"role": "user", "content": "x"}])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer = HfTokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template([]) == "D"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "T"
    (folder / "chat_template.jinja").write_text("F{{ eos_token }}")
    assert HfTokenizer.from_folder(folder).apply_chat_template([]) == "F<|im_end|>"


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", None), ("tokenizer.json", '{"model'), ("tokenizer_config.json", "[1")],
)
def test_missing_and_broken_files_are_named(tmp_path, file, content):
    folder = write_folder(tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=file):
        HfTokenizer.from_folder(folder)
