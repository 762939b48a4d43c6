"""What clients and proxies see of HTTP around an answer: ids, records, compression, silence."""

import gzip
import json
import shutil
import socket
import subprocess

import httpx
import openai
import pytest

from core.errors import WorkerDied
from plugins.frontends._openai import streaming
from tests.support.http_stack import ANSWER, MODEL, Stack

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}


def texts(lines):
    """The contents in the lines of an event stream."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def record_with(stack, request_id):
    """The record of a request; it is written right after the last byte of the answer."""
    while True:
        found = [record for record in stack.records if record.request_id == request_id]
        if found:
            return found[0]
        stack.call(lambda: None)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_told_of_a_request(stack, http, stream):
    request_id = f"mine-{stream}"
    body = {**BODY, "stream": stream, "n": 2, "max_tokens": 3}
    answer = http.post(CHAT, json=body, headers={"x-request-id": request_id})
    assert answer.headers["x-request-id"] == request_id
    record = record_with(stack, request_id)
    prompt = stack.tokenizer.apply_chat_template(BODY["messages"])
    num_prompt = len(stack.tokenizer.encode(prompt, add_special_tokens=False))
    assert (record.method, record.path, record.route, record.status) == ("POST", CHAT, CHAT, 200)
    assert (record.prompt_tokens, record.completion_tokens) == (num_prompt, 6)
    assert (record.finish_reason, record.code) == ("length", "")
    assert record.answer_id.startswith("chatcmpl-")
    assert record.answer_id in answer.text
    assert record.bytes_in == len(answer.request.content)
    assert record.bytes_out == len(answer.content)
    assert 0 <= record.first_token_s <= record.duration_s
    assert record.client.startswith("127.0.0.1:")


def test_refusals_are_told_and_counted():
    with Stack(api_key="key") as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        right = {"authorization": "Bearer key"}
        for path, headers, status in (
            ("/v1/models", {}, 401),
            ("/v1/models", {"host": "evil.example"}, 403),
            ("/nothing", right, 404),
            (CHAT, right, 405),
        ):
            answer = http.get(path, headers=headers)
            assert answer.status_code == status
            assert len(answer.headers["x-request-id"]) == 32
        page = http.get("/metrics", headers=right).text
    for code in ("invalid_api_key", "invalid_host", "not_found", "method_not_allowed"):
        assert f'nodeweave_http_refusals_total{{code="{code}"}} 1.0' in page
    assert 'nodeweave_http_responses_total{route="none",status="401"} 1.0' in page
    assert [record.code for record in stack.records[:3]] == [
        "invalid_api_key", "invalid_host", "not_found"
    ]  # fmt: skip


def test_compressed_bodies(http):
    body = gzip.compress(json.dumps(BODY).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post(CHAT, content=body, headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    bomb = gzip.compress(b'{"messages": "' + b" " * 100_000_000 + b'"}')
    assert len(bomb) < 200_000
    answer = http.post(CHAT, content=bomb, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = http.post(CHAT, content=body, headers={**headers, "content-encoding": "zstd"})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")


def test_slashes_and_options(http):
    for path in (f"{CHAT}/", f"{CHAT}//", "/v1//chat/completions"):
        answer = http.post(path, json=BODY)
        assert answer.json()["choices"][0]["message"]["content"] == ANSWER, path
    assert http.get(f"/v1/models/{MODEL}/").json()["id"] == MODEL
    answer = http.options(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (204, "POST, OPTIONS")
    assert http.options("/nothing").status_code == 404
    head = http.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")


def test_a_stream_over_http_1_0(stack):
    host, port = stack.url.removeprefix("http://").split(":")
    body = json.dumps(STREAM).encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST %b HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
        )
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert texts(events.decode().split("\n")) == ANSWER
    assert events.endswith(b"data: [DONE]\n\n")


@pytest.fixture
def impatient(monkeypatch):
    """A stream's headers come at once, and comments often."""
    monkeypatch.setattr(streaming, "HEADERS_S", 0.0)
    monkeypatch.setattr(streaming, "COMMENTS_S", 0.001)


def test_a_silent_stream_says_that_it_lives(stack, http, impatient):
    stack.engine.stepping.clear()
    with http.stream("POST", CHAT, json=STREAM) as answer:
        assert answer.status_code == 200, "before the engine has made any step"
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(6)] == [": keep-alive", ""] * 3
        stack.engine.stepping.set()
        assert texts(lines) == ANSWER


def test_openais_client_skips_comments(stack, client, impatient):
    stack.engine.steps_per_second = 100
    stream = client.chat.completions.create(**STREAM)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER


def test_an_error_after_the_headers_is_an_event(impatient):
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        stack.engine.stepping.clear()
        with http.stream("POST", CHAT, json=STREAM) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": keep-alive"
            stack.call(stack.client.fail_all, lambda: WorkerDied("worker 1 was killed"))
            events = [line for line in lines if line.startswith("data: ")]
        assert len(events) == 1
        assert json.loads(events[0][6:])["error"]["code"] == "engine_dead"
        record = record_with(stack, answer.headers["x-request-id"])
        assert (record.status, record.code, record.finish_reason) == (
            200, "engine_dead", "unfinished"
        )  # fmt: skip


def test_an_error_before_has_its_own_status(stack, http):
    answer = http.post(CHAT, json={**STREAM, "n": 0})
    assert answer.status_code == 400


def test_a_client_that_leaves_is_told_as_499(stack):
    stack.engine.stepping.clear()
    with (
        httpx.Client(base_url=stack.url, timeout=20) as http,
        pytest.raises(httpx.ReadTimeout),
    ):
        http.post(CHAT, json=BODY, headers={"x-request-id": "left"}, timeout=0.2)
    record = record_with(stack, "left")
    assert (record.status, record.finish_reason) == (499, "unfinished")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(stack):
    def curl(*arguments):
        command = ["curl", "-sS", "--max-time", "20", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    body = json.dumps(STREAM)
    said = curl("-N", f"{stack.url}{CHAT}", "--json", body)
    assert texts(said.splitlines()) == ANSWER
    assert "curl: -H 'Content-Type" in curl(f"{stack.url}{CHAT}", "-d", body)
    both = curl(f"{stack.url}/v1/models", f"{stack.url}/health", "--http1.0")
    assert '{"status":"ok"}' in both
    large = json.dumps({**BODY, "user": "x" * 100_000})  # curl sends Expect: 100-continue
    said = curl(f"{stack.url}{CHAT}", "--json", large, "-H", "Expect: 100-continue")
    assert json.loads(said)["choices"][0]["message"]["content"] == ANSWER


def test_request_ids_of_openais_client(stack, client):
    raw = client.chat.completions.with_raw_response.create(
        **BODY, extra_headers={"X-Request-Id": "from-a-client"}
    )
    assert raw.parse()._request_id == "from-a-client"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**BODY, "model": "other"})
    assert len(caught.value.request_id) == 32
