"""What the text service does for one job, in this process: parsing, checks, lengths, ids."""

import json

import msgspec
import pytest

from core.errors import RequestError
from core.interfaces.text import (
    MAX_TOKENIZED,
    ChatText,
    IdsToText,
    PromptTexts,
    SplitBody,
    TokenList,
)
from core.serve.text.jobs import NoLimits, TextJobs
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import byte_level, write_folder
from tests.support.template_manners import MANNERS

USER = [{"role": "user", "content": "hello 日本語"}]
VARIABLES = "chat_template_kwargs"
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}


def raw(value):
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    template = MANNERS["qwen2.5"]
    return HfTokenizer.from_folder(write_folder(tmp_path_factory.mktemp("jobs"), template=template))


@pytest.fixture(scope="module")
def jobs(tokenizer):
    return TextJobs(tokenizer, NoLimits())


def ids_of(packed):
    return list(memoryview(packed.ids).cast("I"))


def test_a_chat_is_rendered_and_tokenized(jobs, tokenizer):
    [found] = jobs.run(ChatText(messages=raw(USER)))
    text = tokenizer.apply_chat_template(USER)
    assert ids_of(found) == byte_level().encode(text, add_special_tokens=False).ids
    assert found.num_tokens == len(ids_of(found))


def test_functions_are_tools(jobs):
    tools = [{"type": "function", "function": TOOL}]
    [new] = jobs.run(ChatText(messages=raw(USER), tools=raw(tools)))
    [older] = jobs.run(ChatText(messages=raw(USER), functions=raw([TOOL])))
    [none] = jobs.run(ChatText(messages=raw(USER), tools=raw([])))
    assert new == older
    assert new.num_tokens > none.num_tokens


def test_variables_come_before_defaults(tmp_path):
    template = "{{ reasoning_effort }}{{ other }}"
    tokenizer = HfTokenizer.from_folder(write_folder(tmp_path, template=template))
    jobs = TextJobs(tokenizer, NoLimits())
    variables = raw({"other": "x", "reasoning_effort": "low"})
    job = ChatText(messages=raw(USER), variables=variables, defaults={"reasoning_effort": "high"})
    assert ids_of(jobs.run(job)[0]) == tokenizer.encode("lowx")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["hello", "world"], ["hello", "world"]),
        (None, [""]),
    ],
)
def test_texts(jobs, tokenizer, prompt, texts):
    found = jobs.run(PromptTexts(prompt=raw(prompt), vocab_size=9, max_prompts=2, echo=True))
    assert [ids_of(one) for one in found] == [tokenizer.encode(text) for text in texts]
    assert [one.text for one in found] == texts


def test_token_ids(jobs, tokenizer):
    ids = tokenizer.encode("hello world")
    [one] = jobs.run(PromptTexts(prompt=raw(ids), vocab_size=500, echo=True))
    assert (ids_of(one), one.text) == (ids, "hello world")
    two = jobs.run(PromptTexts(prompt=raw([ids, [0]]), vocab_size=500, max_prompts=2))
    assert [ids_of(one) for one in two] == [ids, [0]]
    assert two[0].text is None


def test_what_is_sure_to_be_too_long_is_not_tokenized(jobs, tokenizer, monkeypatch):
    def never(*_, **__):
        raise AssertionError("tokenized")

    monkeypatch.setattr(tokenizer, "encode", never)
    monkeypatch.setattr(tokenizer, "apply_chat_template", never)
    size = 10 * (tokenizer.max_token_characters + 1)
    [text] = jobs.run(PromptTexts(prompt=raw("x" * size), vocab_size=9, max_tokens=9))
    call = {"function": {"name": "f", "arguments": "y" * size}}
    calls = [*USER, {"role": "assistant", "tool_calls": [call]}]
    [chat] = jobs.run(ChatText(messages=raw(calls), max_tokens=9))
    tools = [{"type": "function", "function": TOOL | {"description": "z" * size}}]
    [described] = jobs.run(ChatText(messages=raw(USER), tools=raw(tools), max_tokens=9))
    for found in (text, chat, described):
        assert found.at_least
        assert found.num_tokens >= 10
        assert found.ids == b""


def test_ids_of_a_prompt_that_is_too_long_stay_here(jobs):
    [found] = jobs.run(PromptTexts(prompt=raw("x y z x y z x y z"), vocab_size=9, max_tokens=5))
    assert found.num_tokens > 5
    assert (found.ids, found.at_least) == (b"", False)
    [found] = jobs.run(PromptTexts(prompt=raw([1] * 6), vocab_size=9, max_tokens=5))
    assert (found.num_tokens, found.ids) == (6, b"")


def test_tokens_as_json(jobs, tokenizer):
    ids = tokenizer.encode("hello 🎉")
    source = PromptTexts(prompt=raw("hello 🎉"), vocab_size=9)
    found = jobs.run(TokenList(source=source, strings=True))
    assert json.loads(found.tokens) == ids
    assert json.loads(found.strings) == [tokenizer.token_text(i) for i in ids]
    assert json.loads(jobs.run(TokenList(source=source)).strings) is None
    assert json.loads(jobs.run(IdsToText(tokens=raw(ids), vocab_size=500))) == "hello 🎉"


def test_the_number_of_tokens_in_json_is_bounded(jobs):
    source = PromptTexts(prompt=raw([1] * (MAX_TOKENIZED + 1)), vocab_size=9)
    with pytest.raises(RequestError, match="allowed here"):
        jobs.run(TokenList(source=source))
    with pytest.raises(RequestError, match="allowed: 0 to"):
        jobs.run(IdsToText(tokens=source.prompt, vocab_size=9))


def test_half_a_surrogate_pair_in_arguments_does_no_harm(jobs):
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud83d x"}'}}
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    [found] = jobs.run(ChatText(messages=raw(messages)))
    assert found.num_tokens > 0


@pytest.mark.parametrize(
    ("job", "message", "param"),
    [
        (ChatText(messages=b'[{"role": "user", "content": "\xff"}]'), "UTF-8", None),
        (ChatText(messages=b'[{"role": "user", "content": "\\ud800"}]'), "not valid JSON", None),
        (ChatText(messages=b"[" * 5000 + b"]" * 5000), "nested too deeply", None),
        (ChatText(messages=b"null"), "expected array", "messages"),
        (ChatText(messages=raw(USER), tools=b'"x"'), "array of objects", "tools"),
        (ChatText(messages=raw(USER), tools=b"[1]"), "array of objects", "tools"),
        (ChatText(messages=raw(USER), variables=b"[]"), "expected object", VARIABLES),
        (ChatText(messages=raw(USER), variables=b'{"tools": 1}'), "may not", VARIABLES),
        (PromptTexts(prompt=b"[]", vocab_size=9), "empty", "prompt"),
        (PromptTexts(prompt=b'["a", "b"]', vocab_size=9), "2 prompts", "prompt"),
        (PromptTexts(prompt=b"[[1], [9]]", vocab_size=9, max_prompts=2), "vocabulary", "prompt"),
        (PromptTexts(prompt=b"[1, true]", vocab_size=9), "integers only", "prompt"),
        (PromptTexts(prompt=b"1", vocab_size=9), "str or array", "prompt"),
        (IdsToText(tokens=b"{}", vocab_size=9), "expected array", "tokens"),
        (IdsToText(tokens=b'["a"]', vocab_size=9), "expected int", "tokens"),
    ],
)  # fmt: skip
def test_refusals(jobs, job, message, param):
    with pytest.raises(RequestError, match=message) as caught:
        jobs.run(job)
    assert caught.value.param == param


def test_jobs_cross_a_pipe():
    job = TokenList(source=ChatText(messages=b"[]", defaults={"a": 1}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=TokenList) == job


def split(body):
    return SplitBody(
        body=body, text_fields=["messages", "tools"], known_fields=["messages", "tools", "a", "m"],
        ignored_fields=["m"], max_field_bytes=20, max_unknown_bytes=30, unnamed="...",
    )  # fmt: skip


def test_a_body_is_taken_apart(jobs):
    long = '"' + "x" * 50 + '"'
    parts = jobs.run(split(f'{{"a": [1, 2], "messages": [ {long} ], "b": {{}}, "m": 1}}'.encode()))
    assert json.loads(parts.rest) == {"a": [1, 2], "messages": None, "b": 0, "m": 1}
    assert {name: json.loads(text) for name, text in parts.texts.items()} == {
        "messages": ["x" * 50]
    }
    parts = jobs.run(split(f'{{"b": {long}, "c": 1, "m": {long}, "tools": null}}'.encode()))
    assert json.loads(parts.rest) == {"...": 0, "m": {}, "tools": None}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "expected object"),
        (b"{", "not valid JSON"),
        (b'{"a": "\xff", "\xff": 1}', "UTF-8"),
        (b'{"a":' + b"[" * 5000, "nested too deeply|not valid JSON"),
        (b'{"a": "%b"}' % (b"x" * 100), "a takes 102 bytes; allowed: 20"),
    ],
)
def test_bodies_that_can_not_be_taken_apart(jobs, body, message):
    with pytest.raises(RequestError, match=message):
        jobs.run(split(body))
