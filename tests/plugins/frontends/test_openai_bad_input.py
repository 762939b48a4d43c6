"""Bad input: each gets a small error that names the parameter, and the server goes on."""

import json
import socket

import httpx
import pytest

from tests.support.http_stack import ANSWER, MAX_MODEL_LEN, MODEL, Stack

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
LONG = "x" * 100_000


def chat_body(**fields):
    return {"model": MODEL, "messages": USER, **fields}


def completion_body(**fields):
    return {"model": MODEL, "prompt": "hi", **fields}


# (body fields, param, a part of the message)
CHAT_TABLE = [
    ({"temperature": -0.1}, "temperature", "0.0 to 2.0"),
    ({"temperature": 1e300}, "temperature", "0.0 to 2.0"),
    ({"temperature": "hot"}, "temperature", "expected float"),
    ({"temperature": True}, "temperature", "expected float"),
    ({"top_p": 1.01}, "top_p", "0.0 to 1.0"),
    ({"min_p": -1}, "min_p", "0.0 to 1.0"),
    ({"top_k": -2}, "top_k", "-1 to"),
    ({"presence_penalty": 2.1}, "presence_penalty", "-2.0 to 2.0"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2.0 to 2.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "allowed"),
    ({"n": 0}, "n", "1 to 64"),
    ({"n": 10**6}, "n", "1 to 64"),
    ({"n": 1.5}, "n", "expected int"),
    ({"seed": 2**64}, "seed", "allowed"),
    ({"seed": 10**500}, "seed", "out of range"),
    ({"max_tokens": 0}, "max_tokens", "allowed"),
    ({"max_tokens": -5}, "max_tokens", "allowed"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "0 to 4"),
    ({"stop": ["a"] * 17}, "stop", "0 to 16"),
    ({"stop": ""}, "stop", "1 to 1024"),
    ({"stop": [LONG]}, "stop", "1 to 1024"),
    ({"stop": [1]}, "stop[0]", "expected str"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "allowed: 0 to"),
    ({"stop_token_ids": [10**30]}, "stop_token_ids", "allowed: 0 to"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "allowed: 0 to"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100.0 to 100.0"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "expected int"),
    ({"logits_processors": {"five": 1}}, "logits_processors[...]", "expected object"),
    ({"logits_processors": {"five": {}}}, "logits_processors", "has: allowed_token_ids"),
    ({"allowed_token_ids": []}, "logits_processors.allowed_token_ids", "name one at least"),
    ({"allowed_token_ids": [10**9]}, "logits_processors.allowed_token_ids", "allowed: 0 to"),
    (
        {"allowed_token_ids": [1], "logits_processors": {"allowed_token_ids": {"ids": [1]}}},
        "allowed_token_ids",
        "given twice",
    ),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "0 to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported yet"),
    ({"tool_choice": "required"}, "tool_choice", "not supported yet"),
    ({"modalities": ["audio"]}, "modalities", "text only"),
    ({"messages": []}, "messages", "1 to"),
    ({"messages": None}, "messages", "expected array"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]", "role must be one of"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]", "role must be one of"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "role must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "text or a list"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content",
     "type text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content",
     "missing"),
    ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "messages[0].tool_calls",
     "list of calls"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not read tools"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages",
     f"maximum context length is {MAX_MODEL_LEN}"),
    ({"messages": [{"role": "user", "content": LONG * 10}]}, "messages", "at least"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "may not set"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
     "exclude"),
]  # fmt: skip
COMPLETION_TABLE = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", 1]}, "prompt", "list of texts"),
    ({"prompt": ["a", ["b"]]}, "prompt", "list of texts"),
    ({"prompt": [{}]}, "prompt", "list of texts"),
    ({"prompt": [1, "a"]}, "prompt", "integers only"),
    ({"prompt": [True]}, "prompt", "integers only"),
    ({"prompt": [1.5]}, "prompt", "list of texts"),
    ({"prompt": [-1]}, "prompt", "(-1) outside the vocabulary"),
    ({"prompt": [2**63]}, "prompt", "outside the vocabulary"),
    ({"prompt": [[1], [10**40]]}, "prompt", "outside the vocabulary"),
    ({"prompt": ["a"] * 257}, "prompt", "1 to 256"),
    ({"prompt": [1] * MAX_MODEL_LEN}, "prompt", f"has {MAX_MODEL_LEN} tokens"),
    ({"prompt": {"a": 1}}, "prompt", "expected str or array"),
    ({"prompt": ["a"] * 200, "n": 64}, "n", "12800 answers"),
    ({"max_tokens": 0}, "max_tokens", "allowed: 1"),
    ({"logprobs": 21}, "logprobs", "0 to 20"),
    ({"logprobs": True}, "logprobs", "expected int"),
    ({"best_of": 2}, "best_of", "must equal n"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"guided_json": {}}, "guided_json", "not supported"),
]


def check_error(response, status, param, message):
    assert response.status_code == status, response.text
    assert len(response.content) < 4096
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param
    assert error["type"] == ("invalid_request_error" if status != 404 else "not_found_error")


@pytest.mark.parametrize(("fields", "param", "message"), CHAT_TABLE)
def test_chat_refuses(http, stack, fields, param, message):
    check_error(http.post(CHAT, json=chat_body(**fields)), 400, param, message)
    assert stack.engine.seen == []


@pytest.mark.parametrize(("fields", "param", "message"), COMPLETION_TABLE)
def test_completions_refuse(http, stack, fields, param, message):
    check_error(http.post(COMPLETIONS, json=completion_body(**fields)), 400, param, message)
    assert stack.engine.seen == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"[1, 2]", None, "expected object"),
        (b'"text"', None, "expected object"),
        (b'{"messages": [}', None, "not valid JSON"),
        (b'{"messages": [], "user": "\xff\xfe"}', None, "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\xc3("}]}', None, "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "not valid JSON"),
        (b'{"messages": [], "temperature": NaN}', "temperature", "finite"),
        (b'{"messages": [], "temperature":-Infinity}', "temperature", "finite"),
        (b'{"messages": [], "top_p": Infinity, "n": 1}', "top_p", "finite"),
        (b'{"messages": [], "temperature": 1e999}', "temperature", "out of range"),
        (b'{"metadata": ' + b"[" * 200_000, None, "nested too deeply"),
        (b'{"metadata": ' + b"[" * 900 + b"]" * 900 + b"}", "messages", "required"),
        (b'{"model": "m"}', "messages", "required"),
        (b'{"messages": []} trailing', None, "not valid JSON"),
    ],
)
def test_bodies_that_are_no_request(http, body, param, message):
    check_error(http.post(CHAT, content=body, headers=JSON), 400, param, message)


def test_unknown_model_route_and_method(http):
    check_error(http.post(CHAT, json=chat_body(model=LONG)), 404, "model", "does not exist")
    check_error(http.get("/v1/nothing"), 404, None, "no such route")
    check_error(http.get("/"), 404, None, "there are /health, ")
    check_error(
        http.post("/v1/embeddings", json={}), 404, None, "/v1/embeddings is not served here"
    )
    check_error(
        http.post("/v1/audio/speech"), 404, None, "/v1/audio is not served here; there are "
    )
    check_error(http.get("/v1/completion"), 404, None, "did you mean /v1/completions?")
    check_error(http.get("/chat/completions"), 404, None, "did you mean /v1/chat/completions?")
    check_error(http.get("/v1/chat/completions/"), 405, None, "allowed: POST")
    response = http.get(CHAT)
    check_error(response, 405, None, "allowed: POST")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("chunked", [False, True])
def test_20_mib(http, stack, chunked):
    body = json.dumps(chat_body(user="x" * 20 * 1024 * 1024)).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    response = http.post(CHAT, content=pieces if chunked else body, headers=JSON)
    check_error(response, 413, None, "larger than 8388608 bytes")
    assert http.get("/health").status_code == 200


def test_an_announced_size_is_refused_before_the_body_comes(stack):
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain; a=application/json", 415),
    ],
)
def test_a_body_is_said_to_be_json(http, stack, sent, status):
    headers = {} if sent is None else {"content-type": sent}
    for route in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        fields = {"tokens": [1]} if route == "/detokenize" else chat_body()
        fields = {"prompt": "a"} if route in (COMPLETIONS, "/tokenize") else fields
        response = http.post(route, content=json.dumps(fields), headers=headers)
        assert response.status_code == status, route
        if status != 200:
            check_error(response, 415, None, "-H 'Content-Type: application/json'")


def test_tokenize_and_detokenize(http, stack):
    text = "hello 🎉 world"
    ids = stack.tokenizer.encode(text)
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 512)
    assert len(found["token_strs"]) == len(ids)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    found = http.post("/tokenize", json={"model": MODEL, "messages": USER}).json()
    prompt = stack.tokenizer.apply_chat_template(USER)
    assert found["tokens"] == stack.tokenizer.encode(prompt, add_special_tokens=False)
    assert found["token_strs"] is None
    check_error(http.post("/tokenize", json={}), 400, "prompt", "either")
    check_error(http.post("/detokenize", json={"tokens": [-1]}), 400, "tokens", "outside")
    check_error(http.post("/detokenize", json={"tokens": ["a"]}), 400, None, "expected int")
    check_error(http.post("/detokenize", json={}), 400, "tokens", "required")


def test_it_still_answers_after_all_that(http):
    response = http.post(CHAT, json=chat_body())
    assert response.json()["choices"][0]["message"]["content"] == ANSWER


def test_text_whose_tokens_are_beyond_the_models_embedding():
    """A tokenizer that was extended without the model: its last token is part of the text."""
    beyond = "a<é tool>b"
    with Stack(vocab_size=420) as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        assert max(stack.tokenizer.encode(beyond)) == 420
        messages = [{"role": "user", "content": beyond}]
        for path, body, param in (
            (COMPLETIONS, completion_body(prompt=beyond), "prompt"),
            (COMPLETIONS, completion_body(prompt=["hi", beyond]), "prompt"),
            (COMPLETIONS, completion_body(prompt=beyond, stream=True), "prompt"),
            (CHAT, chat_body(messages=messages), "messages"),
            (CHAT, chat_body(messages=messages, stream=True), "messages"),
        ):
            response = http.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param)
            assert error["code"] == "out_of_range"
            assert "420" in error["message"]
            assert "0 to 419" in error["message"]
        assert stack.client.num_live == 0, "what came before the bad prompt was not aborted"
        assert http.post(COMPLETIONS, json=completion_body()).status_code == 200
