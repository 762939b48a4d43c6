"""One answer read to its end, from outputs cut in every way. The texts are written down by hand."""

import asyncio

import pytest

from core.errors import RequestError
from core.frontend.completion import read_completion
from core.interfaces.messages import RequestOutput, SamplingParams, TokenLogprobs
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import write_folder

PROMPT = [5]
PARAMS = SamplingParams(max_tokens=50)


class Bytes:
    """A tokenizer with a token for each byte; 256 is one without text."""

    def detokenizer(self, *, skip_special_tokens=True, prompt_ids=(), takes_over=False):
        assert skip_special_tokens
        assert prompt_ids == PROMPT
        return self

    def __init__(self):
        self._held = b""

    def add(self, token_ids):
        self._held += bytes(i for i in token_ids if i < 256)
        try:
            text, self._held = self._held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def finish(self):
        text, self._held = self._held.decode(errors="replace"), b""
        return text


class Stream:
    """Outputs that are there already, and what its reader said that ended it."""

    def __init__(self, outputs):
        self._outputs = iter(outputs)
        self.closed = []

    def __aiter__(self):
        return self

    async def __anext__(self):
        for output in self._outputs:
            return output
        raise StopAsyncIteration

    def close(self, finish_reason=None):
        self.closed.append(finish_reason)


def read(outputs, stops=(), sampling=PARAMS):
    stream = Stream(outputs)
    answer = asyncio.run(read_completion(stream, Bytes(), PROMPT, sampling, stops))
    assert stream.closed == [answer.finish_reason], "metrics count what the reader found"
    return answer


def cut(ids, size, **last):
    """Outputs of `size` tokens each; what ends the answer comes with the last."""
    pieces = [ids[begin : begin + size] for begin in range(0, len(ids), size)] or [[]]
    outputs = [RequestOutput("r", piece) for piece in pieces]
    for name, value in last.items():
        setattr(outputs[-1], name, value)
    return outputs


def ids_of(text):
    return list(text.encode())


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason", "num_tokens"),
    [
        ("hello world", (), "hello world", None, 11),
        ("hello world", ("xyz", "o w"), "hell", "o w", 7),
        ("hello world", ("world", "lo"), "hel", "lo", 5),  # complete first
        ("hello", ("llo", "lo", "ello"), "h", "ello", 5),  # complete at once: begins first
        ("hello", ("h",), "", "h", 1),
        ("a\u20acb", ("\u20ac",), "a", "\u20ac", 4),  # a character of three tokens
        ("hell", ("hello",), "hell", None, 4),  # begun and not complete
    ],
)
def test_stop_strings(size, text, stops, expected, reason, num_tokens):
    answer = read(cut(ids_of(text), size, finish_reason="length"), stops)
    assert (answer.text, answer.stop_reason) == (expected, reason)
    assert answer.finish_reason == ("stop" if reason else "length")
    assert answer.token_ids == ids_of(text)[:num_tokens]


@pytest.mark.parametrize("size", [1, 2, 50])
def test_stop_strings_count_after_min_tokens(size):
    params = SamplingParams(max_tokens=50, min_tokens=3)
    answer = read(cut(ids_of("abcabc"), size, finish_reason="length"), ("b",), params)
    assert answer.text == "abca"


@pytest.mark.parametrize("size", [1, 50])
def test_the_token_that_ends_is_not_in_the_text(size):
    ids = [*ids_of("ab"), 98]  # "b" again: only the last one is hidden
    answer = read(cut(ids, size, finish_reason="stop", stop_token_id=98))
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("ab", ids, 98)


def test_a_broken_character_at_the_end_is_shown():
    answer = read(cut([97, 0xE2, 0x82], 1, finish_reason="length"))
    assert answer.text == "a\ufffd"


def test_logprobs_end_where_the_tokens_do():
    logprobs = [TokenLogprobs(i, -1.0, 1, [], []) for i in ids_of("abcd")]
    outputs = [RequestOutput("r", ids_of("abcd"), "length", logprobs=logprobs)]
    params = SamplingParams(max_tokens=9, logprobs=0)
    answer = read(outputs, ("c",), params)
    assert answer.token_ids == ids_of("abc")
    assert answer.logprobs == logprobs[:3]
    assert answer.prompt_logprobs is None


def test_what_the_engine_gives_up_is_an_error():
    with pytest.raises(RequestError, match="no room") as caught:
        read([RequestOutput("r", [], "error", error="no room", error_code="queue_timeout")])
    assert caught.value.code == "queue_timeout"
    with pytest.raises(RequestError, match="ended early"):
        read(cut([97], 1))


def test_with_a_real_tokenizer(tmp_path):
    """The answer's text is what prompt and answer have beyond the prompt's."""
    tokenizer = HfTokenizer.from_folder(write_folder(tmp_path / "tokenizer"))
    ids = tokenizer.encode("One sentence, and then another one.", add_special_tokens=False)
    stream = Stream([RequestOutput("r", ids[4:], "length")])
    answer = asyncio.run(read_completion(stream, tokenizer, ids[:4], PARAMS, ()))
    assert tokenizer.decode(ids[:4]) + answer.text == tokenizer.decode(ids)
