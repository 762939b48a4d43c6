"""Answers go on where their prompts ended: against the library's decode of both together.

The library decodes prompt and answer as one list; what that has beyond the prompt's own text is
the right text of the answer, however it is cut into pieces.
"""

import random
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import ModelError
from core.tokenizers.byte_table import REPLACEMENT
from core.tokenizers.detokenizer import MAX_HELD_TOKENS, WindowDetokenizer
from plugins.tokenizers._hf.byte_table import MAX_TOKEN_ID, byte_table
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import byte_fallback, byte_level


@cache
def with_decoder(decoder_name):
    """A vocabulary of words whose decoder looks at a token's neighbours, or at its place."""
    words = ["▁Paris", "▁", "▁▁", "is", "##ing", "a</w>", "b</w>", "c", ".", "'s", "日"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "c"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = {
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
        "bpe": decoders.BPEDecoder(),
        "strip two": decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 2, 0),
            ]
        ),
        "no strip": decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    }[decoder_name]
    return tokenizer


PARTY = (  # 🎉, byte by byte
    (byte_level(), [byte_level().token_to_id(piece) for piece in ("ð", "Ł", "İ", "ī")]),
    (byte_fallback(), [byte_fallback().token_to_id(f"<0x{b:02X}>") for b in "🎉".encode()]),
)
DECODERS = ("metaspace", "wordpiece", "bpe", "strip two", "no strip")


def tokenizer_of(backend):
    return HfTokenizer(backend, special_tokens={}, chat_templates={})


def expected_text(backend, prompt, answer, skip):
    whole = backend.decode([*prompt, *answer], skip_special_tokens=skip)
    before = backend.decode(prompt, skip_special_tokens=skip)
    while not whole.startswith(before):
        before = before[:-1]
    return whole.removeprefix(before)


def streamed(tokenizer, prompt, answer, skip):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt_ids=prompt)
    return "".join([*(detokenizer.add([i]) for i in answer), detokenizer.finish()])


def at_once(tokenizer, prompt, answer, skip):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt_ids=prompt)
    return detokenizer.add(answer) + detokenizer.finish()


def check(backend, draw_ids, skip, count):
    tokenizer = tokenizer_of(backend)
    for _ in range(count):
        prompt, answer = draw_ids(0), draw_ids(1)
        expected = expected_text(backend, prompt, answer, skip)
        assert streamed(tokenizer, prompt, answer, skip) == expected, (prompt, answer)
        assert at_once(tokenizer, prompt, answer, skip) == expected, (prompt, answer)


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_goes_on_even_within_a_character(skip):
    draw, size = random.Random(5), byte_level().get_vocab_size()
    check(
        byte_level(),
        lambda least: [draw.randrange(size) for _ in range(draw.randrange(least, 12))],
        skip,
        600,
    )


@pytest.mark.parametrize("skip", [True, False])
def test_sentencepiece_goes_on_with_its_spaces(skip):
    backend, draw = byte_fallback(), random.Random(6)
    pieces = [i for i in range(backend.get_vocab_size()) if not 3 <= i < 259]
    whole = [backend.encode(text).ids[1:] for text in ("🎉", "é")]

    def draw_ids(least):
        ids = []
        for _ in range(draw.randrange(least, 8)):
            ids += draw.choice(whole) if draw.random() < 0.3 else [draw.choice(pieces)]
        return ids

    check(backend, draw_ids, skip, 400)


@pytest.mark.parametrize("name", DECODERS)
def test_every_other_decoder_goes_on_too(name):
    backend, draw = with_decoder(name), random.Random(7)
    size = backend.get_vocab_size()
    check(
        backend,
        lambda least: [draw.randrange(size) for _ in range(draw.randrange(least, 9))],
        True,
        150,
    )
    assert (byte_table(backend) is None) == (name in ("metaspace", "wordpiece", "bpe"))


def test_a_first_tokens_space_is_lost_only_where_a_text_begins():
    backend = byte_fallback()
    tokenizer = tokenizer_of(backend)
    pa = backend.token_to_id("▁Pa")
    prompt = backend.encode("The capital of France is").ids
    assert streamed(tokenizer, prompt, [pa, pa], True) == " Pa Pa"
    assert streamed(tokenizer, [], [pa, pa], True) == "Pa Pa"
    bos = backend.token_to_id("<s>")
    assert streamed(tokenizer, [bos], [pa], True) == "Pa", "a hidden token is no text"
    assert streamed(tokenizer, [bos], [pa], False) == " Pa"
    space = backend.token_to_id("▁")
    assert streamed(tokenizer, [space], [space, pa], True) == "  Pa"


def test_a_character_that_the_prompt_began_is_the_answers():
    for backend, party in PARTY:
        tokenizer = tokenizer_of(backend)
        a = backend.encode("a").ids[-1:]
        prompt = [*backend.encode("go").ids, *party[:2]]
        assert streamed(tokenizer, prompt, [*party[2:], *a], True) == "🎉a"
        assert streamed(tokenizer, prompt, a, True) == "a", "the broken bytes are the prompt's"
        assert streamed(tokenizer, prompt, [], True) == ""


def test_an_answer_may_take_the_prompts_broken_bytes_over():
    """What was echoed and what follows are the library's decode of both together."""
    for backend, party in PARTY:
        tokenizer = tokenizer_of(backend)
        a = backend.encode("a").ids[-1:]
        for begun in (1, 2, 3):
            prompt = [*backend.encode("go").ids, *party[:begun]]
            text, is_open = tokenizer.decode_open(prompt)
            assert (text, is_open) == ("go", True)
            for answer in ([*party[begun:], *a], a, [*party[begun:-1], *a], []):
                detokenizer = tokenizer.detokenizer(prompt_ids=prompt, takes_over=True)
                pieces = [detokenizer.add([i]) for i in answer]
                whole = backend.decode([*prompt, *answer], skip_special_tokens=False)
                assert "".join([text, *pieces, detokenizer.finish()]) == whole
        assert tokenizer.decode_open(backend.encode("go").ids) == ("go", False)


def test_a_long_prompt_costs_no_more_than_its_end():
    backend = with_decoder("metaspace")
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return backend.decode(ids)

    detokenizer = WindowDetokenizer(decode, frozenset(), [0] * 100_000)
    assert detokenizer.add([0]) == " Paris"
    assert max(seen) < 10


def test_complete_characters_survive_broken_bytes_after_them():
    """The library turns a whole run of byte tokens into U+FFFD where a part of it is broken; what
    was given out before can't be taken back."""
    backend = byte_fallback()
    tokenizer = tokenizer_of(backend)
    ids = [*backend.encode("🎉").ids[1:], backend.token_to_id("<0xFF>")]
    assert streamed(tokenizer, [], ids, True) == "🎉\ufffd"
    assert tokenizer.decode(ids) == backend.decode(ids) == "\ufffd" * 5


def test_holding_says_whether_a_character_is_unfinished():
    for backend, (first, *rest) in PARTY:
        detokenizer = tokenizer_of(backend).detokenizer()
        assert (detokenizer.add([first]), detokenizer.holding) == ("", True)
        assert (detokenizer.add(rest), detokenizer.holding) == ("🎉", False)


def test_byte_pieces_are_bytes_with_any_decoder_that_knows_them():
    backend = Tokenizer(models.WordLevel({"<0xF0>": 0, "▁a": 1, "<0xZZ>": 2}, "▁a"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = tokenizer_of(backend)
    assert byte_table(backend) is None
    assert [tokenizer.token_bytes(i) for i in range(3)] == [b"\xf0", b" a", b"<0xZZ>"]


def test_a_token_id_beyond_every_vocabulary_is_refused():
    vocab = {"a": 0, "b": MAX_TOKEN_ID + 1}
    backend = Tokenizer(models.WordLevel(vocab, "a"))
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match=str(MAX_TOKEN_ID + 1)):
        byte_table(backend)


def test_bytes_that_become_no_character_are_not_held_for_ever():
    window = WindowDetokenizer(lambda ids: REPLACEMENT * len(ids), frozenset())
    pieces = [window.add([i]) for i in range(MAX_HELD_TOKENS)]
    assert pieces == [""] * (MAX_HELD_TOKENS - 1) + [REPLACEMENT * MAX_HELD_TOKENS]
    assert not window.holding
