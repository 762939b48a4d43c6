"""What clients see of text, tokens and offsets, streamed and not, over a fake engine."""

import json
import unicodedata
from array import array

import openai
import pytest

from core.frontend.answer import Answer, StopMatcher
from core.interfaces.messages import RequestOutput, TokenLogprobs
from core.interfaces.text import PromptTexts
from core.serve.text.jobs import NoLimits, TextJobs
from plugins.frontends._openai.logprobs import completion_logprobs, prompt_offsets
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.http_stack import ANSWER, MODEL
from tests.support.small_tokenizer import byte_fallback, byte_level, word_pieces

USER = [{"role": "user", "content": "hi"}]
PARTY = [byte_level().token_to_id(piece) for piece in ("ð", "Ł", "İ", "ī")]  # 🎉, byte by byte


def tokenizer_of(backend):
    return HfTokenizer(backend, special_tokens={}, chat_templates={})


def whole_or_streamed(client, stream, **arguments):
    """(text, logprobs joined, finish reasons) of a completion."""
    result = client.completions.create(model=MODEL, stream=stream, **arguments)
    choices = [c for chunk in result for c in chunk.choices] if stream else result.choices
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    names = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    joined = {name: [x for part in parts for x in getattr(part, name)] for name in names}
    text = "".join(choice.text for choice in choices)
    return text, joined, [c.finish_reason for c in choices if c.finish_reason]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["🚀 Launch", "日本の首都は", "go", "", None])
def test_offsets_are_places_in_the_text(client, stack, prompt, stream):
    """A character of several tokens counts once, at its first; the others have no text."""
    if prompt is None:  # token ids, a character in pieces
        prompt, shown = [*stack.tokenizer.encode("a"), *PARTY], "a🎉"
    else:
        shown = prompt = prompt or "x"
    stack.engine.reply = lambda _: [*PARTY, *stack.tokenizer.encode(" 日本 on")]
    text, found, ends = whole_or_streamed(
        client, stream, prompt=prompt, echo=True, logprobs=1, max_tokens=30
    )
    assert text == f"{shown}🎉 日本 on"
    assert ends == ["stop"]
    prompt_ids = stack.engine.seen[0].prompt_ids
    ids = [*prompt_ids, *PARTY, *stack.tokenizer.encode(" 日本 on")]
    before = b""
    for token_id, offset in zip(ids, found["text_offset"], strict=True):
        begun = [byte for byte in before if not 0x80 <= byte < 0xC0]  # first bytes of characters
        assert offset == len(begun)
        before += stack.tokenizer.token_bytes(token_id)
    assert before.decode() == text
    plain = whole_or_streamed(client, not stream, prompt=prompt, logprobs=1, max_tokens=30)
    assert plain[1]["text_offset"] == [
        offset - len(shown) for offset in found["text_offset"][len(prompt_ids) :]
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("num_bytes", "answer", "shown"),
    [
        (3, PARTY[3:], "a🎉 on"),
        (1, PARTY[1:], "a🎉 on"),
        (2, [], "a\ufffd on"),
        (3, None, "a\ufffd"),
    ],
)
def test_a_prompt_that_ends_inside_a_character_goes_on_in_it(
    client, stack, stream, num_bytes, answer, shown
):
    """Token ids: what is echoed and what follows join into the character, or into one U+FFFD."""
    prompt = [*stack.tokenizer.encode("a"), *PARTY[:num_bytes]]
    ids = [*answer, *stack.tokenizer.encode(" on")] if answer is not None else []
    stack.engine.reply = lambda _: ids
    text, found, _ = whole_or_streamed(
        client, stream, prompt=prompt, echo=True, logprobs=1, max_tokens=30 if ids else 0
    )
    assert text == shown
    assert found["text_offset"][:4] == [0, 1, 2, 2][: num_bytes + 1] + [2] * (3 - num_bytes)
    if answer:
        plain = whole_or_streamed(client, stream, prompt=prompt, logprobs=1, max_tokens=30)
        assert plain[0] == "🎉 on", "the answer's, as without echo"


def test_offsets_of_a_prompt_that_the_tokenizer_changes_are_places_in_the_prompt():
    """NFD, lowercase and an unknown word: the tokens' own text is another, the text is as sent."""
    tokenizer = tokenizer_of(word_pieces())
    jobs = TextJobs(tokenizer, NoLimits())
    text = "Größe  STOP 漢 go"
    job = PromptTexts(prompt=json.dumps(text).encode(), vocab_size=300, echo=True, offsets=True)
    (packed,) = jobs.run(job)
    ids, offsets = (array("I", x).tolist() for x in (packed.ids, packed.offsets))
    assert packed.text == text
    pieces = [word_pieces().id_to_token(i) for i in ids]
    assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
    assert "[UNK]" in pieces
    assert offsets[0] == 0
    assert offsets[-1] == len(text)
    assert offsets == sorted(offsets)
    places = {piece: text[a] for piece, a in zip(pieces[1:-1], offsets[1:-1], strict=True)}
    assert places["[UNK]"] == "漢"
    for piece, character in places.items():
        plain = unicodedata.normalize("NFD", character)[0].lower()
        assert piece == "[UNK]" or piece.removeprefix("##").startswith(plain), places


@pytest.mark.parametrize("prompt", ["plain", "日本 🎉", ""])
def test_offsets_of_other_prompts_are_told_by_their_tokens(prompt):
    jobs = TextJobs(tokenizer_of(byte_level()), NoLimits())
    job = PromptTexts(prompt=json.dumps(prompt).encode(), vocab_size=999, echo=True, offsets=True)
    assert [packed.offsets for packed in jobs.run(job)] == [None]


def test_offsets_count_a_character_of_several_tokens_once():
    """As the tokens' own texts tell them, where those are the prompt's."""
    for backend, text in ((byte_level(), "a🎉 日本 on"), (byte_fallback(), "The 日本 capital")):
        tokenizer = tokenizer_of(backend)
        ids = tokenizer.encode(text)
        assert tokenizer.offsets(text) == prompt_offsets(tokenizer, ids, text)


def test_offsets_of_a_prompt_leave_out_what_is_not_in_its_text():
    tokenizer = tokenizer_of(byte_fallback())
    ids = byte_fallback().encode("The capital of France").ids
    bos = byte_fallback().token_to_id("<s>")
    text = byte_fallback().decode(ids)
    assert text == "The capital of France"
    offsets = prompt_offsets(tokenizer, [bos, *ids], text)
    assert offsets[:2] == [0, 0]
    tokens = [tokenizer.token_text(i) for i in ids]
    ends = [*offsets[2:], len(text)]
    assert [text[a:b] for a, b in zip(offsets[1:], ends, strict=True)] == [
        tokens[0].removeprefix(" "), *tokens[1:]
    ]  # fmt: skip


def test_parts_of_characters_keep_their_own_numbers():
    """Keyed by text they were all U+FFFD, and the chosen one had the best one's number."""
    tokenizer = tokenizer_of(byte_level())
    chosen, best, third = PARTY[1], PARTY[2], PARTY[3]
    entry = TokenLogprobs(chosen, -3.0, 3, [best, third], [-0.5, -2.0])
    (top,) = completion_logprobs(tokenizer, [entry], [0], 2)["top_logprobs"]
    assert top == {"bytes:\\x8e": -0.5, "bytes:\\x89": -2.0, "bytes:\\x9f": -3.0}
    assert completion_logprobs(tokenizer, [entry], [0], 2)["tokens"] == ["bytes:\\x9f"]


def test_parts_of_characters_have_texts_of_their_own_in_chats_too(client, stack):
    stack.engine.reply = lambda _: PARTY
    result = client.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=1
    )
    content = result.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["\\xf0", "\\x9f", "\\x8e", "\\x89"]
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "🎉"
    assert [entry.top_logprobs[0].token for entry in content] == [e.token for e in content]


def test_tokens_of_one_text_keep_their_own_numbers():
    """In SentencePiece vocabularies <0x61> and the piece "a" are both "a"."""
    backend = byte_fallback()
    tokenizer = tokenizer_of(backend)
    piece, byte = backend.token_to_id("a"), backend.token_to_id("<0x61>")
    assert tokenizer.token_text(piece) == tokenizer.token_text(byte) == "a"
    for chosen, other in ((piece, byte), (byte, piece)):
        entry = TokenLogprobs(chosen, -1.0, 2, [other, chosen], [-0.5, -1.0])
        (top,) = completion_logprobs(tokenizer, [entry], [0], 2)["top_logprobs"]
        assert top == {f"token_id:{other}": -0.5, "a": -1.0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [0, 3])
def test_streamed_logprobs_are_those_of_a_whole_answer(client, stack, stream, logprobs):
    stack.engine.reply = lambda _: [*PARTY, *stack.answer_ids]
    found = whole_or_streamed(client, stream, prompt="x", logprobs=logprobs, stop=["nowhere"])
    other = whole_or_streamed(client, not stream, prompt="x", logprobs=logprobs)
    assert found == other
    assert {len(top) for top in found[1]["top_logprobs"]} == {max(logprobs, 1)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["France is Par", "🎉", "ital of"])
def test_no_logprob_entry_lies_behind_a_stop_string(client, stack, stop, stream):
    before, _, _ = ANSWER.partition(stop)
    text, found, ends = whole_or_streamed(
        client, stream, prompt="x", logprobs=1, stop=stop, max_tokens=99
    )
    assert (text, ends) == (before, ["stop"])
    assert found["text_offset"][-1] < len(before) + len(stop)
    assert ANSWER.startswith("".join(found["tokens"][:-1]))


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_it_counts():
    tokenizer = tokenizer_of(byte_level())
    ids = [byte_level().token_to_id(letter) for letter in "abcdef"]

    def answer(stops, min_tokens):
        made = Answer(
            tokenizer, stops=stops, include_stop=False, skip_special_tokens=True,
            min_tokens=min_tokens, wants_logprobs=False,
        )  # fmt: skip
        pieces = []
        for token_id in ids:
            pieces += made.feed(RequestOutput("r", [token_id]))
            if made.finish_reason:
                break
        else:
            pieces += made.feed(RequestOutput("r", [], finish_reason="length"))
        return "".join(piece.text for piece in pieces), made.finish_reason

    assert answer(["cd"], 3) == ("ab", "stop"), "begins before, ends after"
    assert answer(["abcd"], 3) == ("", "stop")
    assert answer(["bc"], 3) == ("abcdef", "length"), "ends before"
    assert answer(["b", "bcx"], 3) == ("abcdef", "length"), "held back as part of another"
    assert answer(["c", "bcde"], 3) == ("a", "stop")
    assert answer(["ef"], 99) == ("abcdef", "length")


def test_text_that_does_not_count_is_held_back_as_any_other():
    matcher = StopMatcher(["cd"])
    assert matcher.add("abc", counts=False) == ("ab", None)
    assert matcher.add("d") == ("", "cd")


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_top_p_of_zero_is_greedy(client, stack, route):
    create = client.chat.completions.create if route == "chat" else client.completions.create
    prompt = {"messages": USER} if route == "chat" else {"prompt": "x"}
    create(model=MODEL, top_p=0, temperature=1.5, **prompt)
    create(model=MODEL, top_p=0.5, temperature=1.5, **prompt)
    first, second = (request.sampling for request in stack.engine.seen)
    assert (first.temperature, first.top_p) == (0.0, 1.0)
    assert (second.temperature, second.top_p) == (1.5, 0.5)


def test_two_streamed_answers_have_one_role_and_one_end_each(client, stack):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])
    for index in (0, 1):
        own = [choice for choice in choices if choice.index == index]
        assert [bool(choice.delta.role) for choice in own] == [True] + [False] * (len(own) - 1)
        assert [c.finish_reason for c in own if c.finish_reason] == ["stop"]
        assert "".join(choice.delta.content or "" for choice in own) == ANSWER
        assert own[-1].finish_reason == "stop"
        assert own[-1].delta.to_dict() == {}, "an end says nothing but how it ended"
    usage = chunks[-1].usage
    assert usage.prompt_tokens == len(stack.engine.seen[0].prompt_ids), "n=2 counts it once"
    assert usage.completion_tokens == 2 * (len(stack.answer_ids) + 1)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_an_answer(client, stack, stream):
    text, found, ends = whole_or_streamed(
        client, stream, prompt="hello 🎉", echo=True, logprobs=0, max_tokens=0
    )
    assert (text, ends) == ("hello 🎉", ["length"])
    assert found["token_logprobs"][0] is None
    assert len(found["tokens"]) == len(stack.engine.seen[0].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_emoji_sequences_come_out_whole(client, stack, stream):
    text = "👩‍👩‍👧‍👦 🏳️‍🌈 é 👍🏽"
    stack.engine.reply = lambda _: [
        byte_level().token_to_id(letter)
        for letter in byte_level().pre_tokenizer.pre_tokenize_str(text)
        for letter in letter[0]
    ]
    arguments = {"prompt": "x", "max_tokens": 200}
    got, _, _ = whole_or_streamed(client, stream, **arguments)
    assert got == text
    if stream:
        result = client.completions.create(model=MODEL, stream=True, **arguments)
        assert not any("\ufffd" in c.text for chunk in result for c in chunk.choices)


def test_detokenize_is_the_librarys_decode(http, stack):
    for ids in (PARTY[:2], [*PARTY, PARTY[0], PARTY[0]], [PARTY[3]] * 100):
        found = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert found == byte_level().decode(ids, skip_special_tokens=False)


def test_the_real_client_reads_what_bytes_are_written(client, stack):
    stack.engine.reply = lambda _: PARTY
    result = client.completions.create(model=MODEL, prompt="x", logprobs=1)
    tokens = result.choices[0].logprobs.tokens
    raw = b"".join(
        json.loads('"' + token.removeprefix("bytes:").replace("\\x", "\\u00") + '"').encode("latin")
        for token in tokens
    )
    assert raw.decode() == "🎉"
    assert isinstance(result, openai.types.Completion)
