"""Fields that clients send: OpenAI's own are taken, others ignored and named, or refused."""

import json
import typing

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat

from core.errors import RequestError
from core.frontend.decoding import MAX_FIELD_BYTES, decode
from core.frontend.fields import HEADER, MAX_NAMED, UNNAMED, header_value
from core.serve.counts import MAX_FIELD_NAMES, Counts
from plugins.frontends._openai.fields import OF_GENERATION, REFUSED
from plugins.frontends._openai.protocol import (
    IGNORED,
    ChatRequest,
    CompletionRequest,
)
from tests.support.http_stack import ANSWER, MAX_MODEL_LEN, MODEL, Stack

NAMED = HEADER.decode()
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
BASE = {CHAT: {"messages": USER}, COMPLETIONS: {"prompt": "hi"}}
SCHEMAS = {
    CHAT: chat.CompletionCreateParamsBase,
    COMPLETIONS: completion_create_params.CompletionCreateParamsBase,
}
# A value of each field of OpenAI's with which a text model still answers in text.
HARMLESS = {
    "messages": USER, "model": MODEL, "prompt": "hi", "audio": {"voice": "x", "format": "wav"},
    "best_of": 1, "echo": False, "frequency_penalty": 0.5, "function_call": "auto",
    "functions": [TOOL], "logit_bias": {"5": 1}, "max_completion_tokens": 9, "max_tokens": 9,
    "metadata": {"a": "b"}, "modalities": ["text"], "moderation": {"model": "x"}, "n": 1,
    "parallel_tool_calls": True, "presence_penalty": 0.5,
    "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
    "prompt_cache_options": {}, "prompt_cache_retention": "24h", "reasoning_effort": "low",
    "response_format": {"type": "text"}, "safety_identifier": "s", "seed": 1,
    "service_tier": "auto", "stop": ["x"], "store": False,
    "stream_options": {"include_usage": True}, "suffix": "", "temperature": 1,
    "tool_choice": "auto", "tools": [{"type": "function", "function": TOOL}], "top_logprobs": 0,
    "top_p": 1, "user": "u",
    "verbosity": "low", "web_search_options": {},
}  # fmt: skip
CLIENTS = [  # (fields of popular clients, those that are named)
    ({"verbosity": "low", "prediction": None, "audio": None, "functions": None}, "verbosity"),
    ({"web_search_options": None, "function_call": None}, None),
    ({"enable_thinking": False, "thinking": {"type": "disabled"}}, "enable_thinking, thinking"),
    ({"litellm_session_id": "x"}, "litellm_session_id"),
    ({"cache_prompt": True, "repeat_penalty": 1.1}, "cache_prompt, repeat_penalty"),
    ({"keep_alive": "5m", "options": {"num_ctx": 2048}}, "keep_alive, options"),
    ({"length_penalty": 1.0, "return_token_ids": True}, "length_penalty, return_token_ids"),
    ({"nvext": {"ignore_eos": True}}, "nvext"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_every_field_of_openais_is_taken_null_included(http, route):
    for name in typing.get_type_hints(SCHEMAS[route]):
        harmless = 3 if (name, route) == ("logprobs", COMPLETIONS) else HARMLESS.get(name, True)
        values = [harmless] if name in ("messages", "prompt") else [harmless, None]
        for value in values:
            body = {**BASE[route], name: value, "stream": name == "stream_options"}
            if name in ("tools", "functions"):
                body["tool_choice"] = "none"  # this template has no place for them
            response = http.post(route, json=body)
            assert response.status_code == 200, (name, value, response.text)
            assert response.headers.get(NAMED, name) == name
            assert NAMED not in response.headers or name in IGNORED
    for name in typing.get_type_hints(
        chat_completion_stream_options_param.ChatCompletionStreamOptionsParam
    ):
        for value in (True, None):
            body = {**BASE[route], "stream": True, "stream_options": {name: value}}
            response = http.post(route, json=body)
            assert response.status_code == 200
            assert NAMED not in response.headers


@pytest.mark.parametrize(("fields", "named"), CLIENTS)
@pytest.mark.parametrize("stream", [False, True])
def test_fields_of_popular_clients_are_ignored_and_named(http, stack, fields, named, stream):
    for route in (CHAT, COMPLETIONS):
        if route == COMPLETIONS and "functions" in fields:
            continue  # of chat alone: unknown here, and named
        response = http.post(route, json={**BASE[route], **fields, "stream": stream})
        assert response.status_code == 200, response.text
        if route == CHAT:
            assert response.headers.get(NAMED) == named
        if not stream and route == COMPLETIONS:
            assert response.json()["choices"][0]["text"] == ANSWER


def test_ignored_fields_are_named_in_errors_and_counted(http):
    response = http.post(CHAT, json={**BASE[CHAT], "temprature": 1, "n": 0})
    assert response.status_code == 400
    assert response.headers[NAMED] == "temprature"
    body = {**BASE[CHAT], "stream": True, "stream_options": {"include_usge": 1}, "dry": 0}
    response = http.post(CHAT, json=body)
    assert response.headers[NAMED] == "dry, stream_options.include_usge"
    page = http.get("/metrics").text
    for name in ("temprature", "dry", "stream_options.include_usge"):
        assert f'nodeweave_ignored_fields_total{{field="{name}"}} 1.0' in page
    response = http.post("/tokenize", json={"prompt": "a", "mm_processor_kwargs": {}})
    assert (response.status_code, response.headers[NAMED]) == (200, "mm_processor_kwargs")


def test_names_in_the_header_and_in_metrics_are_bounded():
    hostile = ["a\r\nset-cookie: x", "é" * 10**6, *(f"f{i}" for i in range(10**4))]
    value = header_value(hostile)
    assert len(value) < 70 * MAX_NAMED
    assert value.startswith(b"a??set-cookie??x, ???")
    assert value.endswith(b", ...")
    metrics = Counts()
    metrics.ignore(hostile)
    metrics.ignore(["f1"])
    assert len(metrics.ignored_fields) == MAX_FIELD_NAMES + 1
    assert sum(metrics.ignored_fields.values()) == len(hostile) + 1
    assert max(map(len, metrics.ignored_fields)) <= 64


def test_a_body_of_unknown_fields_alone_is_answered(http):
    body = json.dumps({**BASE[CHAT], **{f"field_{i}\r\n": [i] for i in range(2000)}})
    headers = {"content-type": "application/json"}
    response = http.post(CHAT, content=body, headers=headers)
    assert response.status_code == 200
    assert response.headers[NAMED].count(",") == MAX_NAMED


@pytest.mark.parametrize("name", REFUSED)
def test_fields_without_which_the_answer_is_of_no_use_are_refused(name):
    asking = {**BASE[CHAT], name: {"a": 1}, "dry": 1}
    with pytest.raises(RequestError, match=f"{name} is not supported") as caught:
        decode(json.dumps(asking).encode(), ChatRequest, OF_GENERATION)
    assert (caught.value.param, caught.value.code) == (name, "unsupported")
    for value in (None, False, [], ""):
        decoded = decode(
            json.dumps({**BASE[CHAT], name: value}).encode(), ChatRequest, OF_GENERATION
        )
        assert decoded.ignored == [name]


def test_what_is_asked_of_known_fields_is_not_lost_beside_unknown_ones():
    fields = {"foo": [1, {"a": None}], "temperature": 0.25, "stop": ["é\n"], "bar": "x" * 10**5}
    body = json.dumps({**BASE[CHAT], **fields, "logit_bias": {"7": -1}}).encode()
    decoded, ignored = decode(body, ChatRequest, OF_GENERATION)
    assert ignored == ["foo", "bar"]
    assert (decoded.temperature, decoded.stop, decoded.logit_bias) == (0.25, ["é\n"], {7: -1.0})
    with pytest.raises(RequestError, match="temperature: expected float"):
        decode(
            json.dumps({**BASE[CHAT], "foo": 1, "temperature": "x"}).encode(),
            ChatRequest,
            OF_GENERATION,
        )
    with pytest.raises(RequestError, match=r"^messages is required$"):
        decode(b'{"foo": 1}', ChatRequest, OF_GENERATION)
    with pytest.raises(RequestError, match=r"^messages is required; mesages is no field$"):
        decode(b'{"mesages": []}', ChatRequest, OF_GENERATION)
    with pytest.raises(RequestError, match="stream_options: expected object"):
        decode(
            json.dumps({**BASE[CHAT], "foo": 1, "stream_options": [1]}).encode(),
            ChatRequest,
            OF_GENERATION,
        )


def test_functions_are_tools_under_their_older_name():
    body = {**BASE[CHAT], "functions": [TOOL], "function_call": {"name": "f"}}
    decoded = decode(json.dumps(body).encode(), ChatRequest, OF_GENERATION).body
    assert json.loads(bytes(decoded.functions)) == [TOOL]  # read as tools by the text service
    assert decoded.tool_choice == {"type": "function", "function": {"name": "f"}}
    none = decode(
        json.dumps({**body, "function_call": "none"}).encode(), ChatRequest, OF_GENERATION
    ).body
    assert none.tool_choice == "none"


def test_a_null_prompt_is_the_beginning_of_a_text(http, stack):
    response = http.post(COMPLETIONS, json={"prompt": None})
    assert response.status_code == 400, "this tokenizer puts nothing before a text"
    assert response.json()["error"]["code"] == "empty_prompt"
    with pytest.raises(RequestError, match="prompt is required"):
        decode(b"{}", CompletionRequest, OF_GENERATION)


@pytest.mark.parametrize("asked", [MAX_MODEL_LEN, 10**9, 10**30])
def test_max_tokens_beyond_the_room_is_the_room(http, stack, asked):
    for route, name in ((CHAT, "max_tokens"), (CHAT, "max_completion_tokens"),
                        (COMPLETIONS, "max_tokens")):  # fmt: skip
        assert http.post(route, json={**BASE[route], name: asked}).status_code == 200
        seen = stack.engine.seen[-1]
        assert seen.sampling.max_tokens == MAX_MODEL_LEN - len(seen.prompt_ids)


def test_strict_servers_refuse_what_others_do_without():
    import httpx

    cases = [
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"x" * 10**5: 1}, None, "Unrecognized"),
        ({"foo": None}, "foo", "Unrecognized"),
        ({"stream": True, "stream_options": {"include_usge": True}},
         "stream_options.include_usge", "did you mean include_usage"),
        ({"max_tokens": 10**9}, "max_tokens", f"maximum context length is {MAX_MODEL_LEN}"),
        ({"max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens", "asks for"),
    ]  # fmt: skip
    with Stack(strict_fields=True) as stack, httpx.Client(base_url=stack.url) as http:
        for fields, param, words in cases:
            response = http.post(CHAT, json={**BASE[CHAT], **fields})
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
            assert param is None or response.json()["error"]["param"] == param
        own = {"verbosity": "low", "audio": None, "max_tokens": 4}
        assert http.post(CHAT, json={**BASE[CHAT], **own}).status_code == 200


def padded(**fields):
    """A chat body beyond the size up to which bodies are taken apart field by field."""
    long = [{"role": "user", "content": "é" * 10**5}]
    return json.dumps({**fields, "messages": long}, ensure_ascii=False).encode()


def test_large_bodies_are_read_as_small_ones_are():
    fields = {"n": 2, "stop": ["a"], "user": "u", "verbosity": "low", "logit_bias": {"1": 2}}
    for extra in ({}, {"foo": 1, "stream_options": {"bar": 1, "include_usage": True}}):
        small, small_ignored = decode(
            json.dumps({**BASE[CHAT], **fields, **extra}).encode(), ChatRequest, OF_GENERATION
        )
        large, large_ignored = decode(padded(**fields, **extra), ChatRequest, OF_GENERATION)
        assert small_ignored == large_ignored
        assert json.loads(bytes(large.messages))[0]["content"] == "é" * 10**5
        for name in set(ChatRequest.__struct_fields__) - {"messages"}:
            one, other = getattr(small, name), getattr(large, name)
            if isinstance(one, msgspec.Raw):
                one, other = bytes(one), bytes(other)
            assert one == other, name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": "x"}, "n: expected int"),
        ({"guided_json": {"a": 1}}, "guided_json is not supported"),
        ({"metadata": {"a": "x" * 10**6}, "ebnf": "x"}, "ebnf is not supported"),
        ({"stop": ["x" * MAX_FIELD_BYTES]}, f"allowed: {MAX_FIELD_BYTES}"),
        ({"logit_bias": {str(i): 1 for i in range(10**5)}}, "logit_bias takes"),
    ],
)
def test_large_bodies_are_refused_as_small_ones_are(fields, words):
    with pytest.raises(RequestError, match=words):
        decode(padded(**fields), ChatRequest, OF_GENERATION)
    with pytest.raises(RequestError, match="foo"):
        decode(padded(foo=1), ChatRequest, OF_GENERATION, strict=True)
    with pytest.raises(RequestError, match="messages is required"):
        decode(json.dumps({"user": "x" * 10**5}).encode(), ChatRequest, OF_GENERATION)
    with pytest.raises(RequestError, match="not valid JSON"):
        decode(padded()[:-1], ChatRequest, OF_GENERATION)


def test_what_has_no_effect_is_never_built_and_too_many_names_are_not_told():
    body = b'{"prompt": "a", "metadata": [' + b"[]," * 10**6 + b"0]}"
    found = decode(body, CompletionRequest, OF_GENERATION)
    assert type(found.body.metadata) is msgspec.Raw
    assert found.ignored == []
    for count, told in ((5_000, 5_000), (50_000, 1)):
        fields = {f"field_{i}": i for i in range(count)}
        names = decode(
            json.dumps({"prompt": "a", **fields}).encode(), CompletionRequest, OF_GENERATION
        ).ignored
        assert names == (list(fields) if told > 1 else [UNNAMED])
