"""Stop strings and text of one answer, against slow and obvious oracles."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RequestError
from core.frontend.answer import Answer, StopMatcher
from core.frontend.generation import SLICE_TOKENS, sliced
from core.interfaces.messages import RequestOutput, TokenLogprobs
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import write_folder

letters = st.text("ab", max_size=12)


def oracle(text, stops):
    """Character by character: stop when some stop string is complete, the longest of them."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    matcher = StopMatcher(stops)
    given_out, found = "", None
    whole, expected = oracle("".join(pieces), stops)
    for piece in pieces:
        text, found = matcher.add(piece)
        given_out += text
        assert whole.startswith(given_out), "part of a stop string was given out"
        if found is not None:
            break
    if found is None:
        given_out += matcher.finish()
    assert (given_out, found) == (whole, expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(letters, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=2))
def test_no_more_is_held_back_than_needed(pieces, stops):
    matcher = StopMatcher(stops)
    seen = given_out = ""
    for piece in pieces:
        text, found = matcher.add(piece)
        seen, given_out = seen + piece, given_out + text
        if found is not None:
            return
        held = seen[len(given_out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = [seen[i:] for i in range(len(given_out))]
        assert not any(stop.startswith(end) for stop in stops for end in longer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HfTokenizer.from_folder(write_folder(tmp_path_factory.mktemp("answer")))


def make(tokenizer, **arguments):
    defaults = {
        "stops": (), "include_stop": False, "skip_special_tokens": True, "min_tokens": 0,
        "wants_logprobs": False,
    }  # fmt: skip
    return Answer(tokenizer, **(defaults | arguments))


def outputs_of(tokenizer, text, size=1, **last):
    """The engine's outputs for a text, `size` tokens each, the last with `last`."""
    ids = tokenizer.encode(text)
    outputs = [RequestOutput("r", ids[i : i + size]) for i in range(0, len(ids), size)]
    for output in outputs:
        output.logprobs = [TokenLogprobs(i, -1.0, 1, [], []) for i in output.token_ids]
    for name, value in last.items():
        setattr(outputs[-1], name, value)
    return outputs


def feed(answer, outputs):
    pieces = []
    for output in outputs:
        pieces += answer.feed(output)
        if answer.finish_reason is not None:
            break
    return pieces


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("stops", [(), ("Paris",), ("🎉",), ("absent", "s. 🎉 a")])
def test_merged_outputs_give_the_same_answer(tokenizer, size, stops):
    text = "Paris is 日本語 and Paris. 🎉 and on"
    expected, stop = oracle(text, stops)
    answer = make(tokenizer, stops=stops, wants_logprobs=True)
    pieces = feed(answer, outputs_of(tokenizer, text, size, finish_reason="length"))
    assert "".join(piece.text for piece in pieces) == expected
    assert (answer.finish_reason, answer.stop_reason) == ("stop" if stop else "length", stop)
    logged = [entry.token_id for piece in pieces for entry in piece.logprobs]
    assert logged == tokenizer.encode(text)[: answer.num_tokens]
    if stop is None:
        assert answer.num_tokens == len(tokenizer.encode(text))


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("include_stop", [False, True])
def test_the_stop_token_is_hidden_unless_asked_for(tokenizer, checked, include_stop):
    ids = tokenizer.encode("hello Paris")
    output = RequestOutput("r", list(ids), finish_reason="stop", stop_token_id=ids[-1])
    stops = ("absent",) if checked else ()
    answer = make(tokenizer, include_stop=include_stop, stops=stops)
    text = "".join(piece.text for piece in answer.feed(output))
    assert text == tokenizer.decode(ids if include_stop else ids[:-1])
    assert (answer.num_tokens, answer.stop_reason) == (len(ids), ids[-1])


def test_stop_strings_count_after_min_tokens_only(tokenizer):
    text = "a a a a a a"
    outputs = outputs_of(tokenizer, text, finish_reason="length")
    answer = make(tokenizer, stops=("a",), min_tokens=3)
    given_out = "".join(piece.text for piece in feed(answer, outputs))
    assert answer.num_tokens == 4
    assert given_out == tokenizer.decode(tokenizer.encode(text)[:3]) + " "


def test_text_held_back_comes_out_at_the_end(tokenizer):
    answer = make(tokenizer, stops=("Paris.",))
    pieces = feed(answer, outputs_of(tokenizer, "in Paris", finish_reason="length"))
    assert "".join(piece.text for piece in pieces) == "in Paris"
    ids = tokenizer.encode("🎉")[:-1]
    broken = RequestOutput("r", ids, finish_reason="length")
    assert "".join(piece.text for piece in make(tokenizer).feed(broken)) == "\ufffd"


def test_an_engine_error_is_raised(tokenizer):
    with pytest.raises(RequestError, match="no room") as caught:
        make(tokenizer).feed(RequestOutput("r", [], finish_reason="error", error="no room"))
    assert caught.value.status == 500


def test_what_piled_up_is_worked_on_in_slices():
    ids = list(range(3 * SLICE_TOKENS + 1))
    entries = [TokenLogprobs(i, -1.0, 1, [], []) for i in ids]
    whole = RequestOutput(
        "r", ids, logprobs=entries, finish_reason="stop", stop_token_id=7, num_cached_tokens=3,
        prompt_logprobs=entries[:2],
    )  # fmt: skip
    parts = list(sliced(whole))
    assert [i for part in parts for i in part.token_ids] == ids
    assert [entry for part in parts for entry in part.logprobs] == entries
    assert [part.finish_reason for part in parts] == [None, None, None, "stop"]
    assert [part.stop_token_id for part in parts] == [None, None, None, 7]
    assert [part.num_cached_tokens for part in parts] == [3, None, None, None]
    assert [part.prompt_logprobs is None for part in parts] == [False, True, True, True]
    small = RequestOutput("r", ids[:2], finish_reason="length")
    assert next(sliced(small)) is small
