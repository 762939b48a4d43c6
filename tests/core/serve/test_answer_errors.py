"""A frontend that handles nothing but its own API gets what all frontends share."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from core.errors import RequestError, WorkerDied
from core.frontend.completion import read_completion
from core.interfaces.http import record_of
from core.interfaces.messages import SamplingParams
from core.serve.answer_errors import answer_errors
from tests.support.http_stack import ANSWER, Stack

KEY = "a-key"
RIGHT = {"authorization": f"Bearer {KEY}"}


def small_frontend(context):
    """POST {"temperature": t, "stop": [...]}: the answer's text to a fixed prompt."""

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        body = json.loads((await receive())["body"])
        prompt = [1, 2]
        sampling = SamplingParams(max_tokens=100, temperature=body.get("temperature", 1.0))
        stream = context.engine.generate(f"r-{id(scope)}", prompt, sampling)
        try:
            done = await read_completion(
                stream, context.tokenizer, prompt, sampling, body.get("stop", ())
            )
        finally:
            stream.close()
        record_of(scope).finish_reason = done.finish_reason
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": done.text.encode()})

    return app


@pytest.fixture(scope="module")
def stack():
    with Stack(api_key=KEY, factory=small_frontend) as stack:
        yield stack


@pytest.fixture
def http(stack):
    with httpx.Client(base_url=stack.url, timeout=20) as http:
        yield http


def test_a_stop_string_and_a_request_id(http):
    whole = http.post("/generate", json={}, headers=RIGHT)
    assert (whole.status_code, whole.text) == (200, ANSWER)
    headers = {**RIGHT, "x-request-id": "mine-1"}
    cut = http.post("/generate", json={"stop": ["STOP"]}, headers=headers)
    assert cut.text == ANSWER[: ANSWER.index("STOP")]
    assert cut.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "invalid_api_key"),
        ({"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({**RIGHT, "host": "evil.example"}, 403, "invalid_host"),
    ],
)
def test_strangers_are_refused(http, headers, status, code):
    response = http.post("/generate", json={}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_value_out_of_range_is_named_logged_and_counted(stack, http):
    before = stack.http.refusals["out_of_range"]
    response = http.post("/generate", json={"temperature": -1}, headers=RIGHT)
    assert response.status_code == 400
    assert "temperature" in response.json()["error"]["message"]
    # The next request on the connection is read once the last has ended.
    assert http.post("/generate", json={}, headers=RIGHT).text == ANSWER
    assert stack.http.refusals["out_of_range"] == before + 1
    assert [r.code for r in stack.records if r.status == 400] == ["out_of_range"]


def test_a_full_queue_is_known_without_asking():
    """A frontend that only calls `Engine.generate` is refused there."""
    with (
        Stack(factory=small_frontend, max_running_requests=1, max_queued_requests=0) as stack,
        ThreadPoolExecutor() as others,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        stack.engine.stepping.clear()
        waiting = others.submit(httpx.post, f"{stack.url}/generate", json={}, timeout=20)
        stack.engine.wait_for(lambda: len(stack.engine.live) == 1)
        refused = http.post("/generate", json={})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        stack.engine.stepping.set()
        assert waiting.result().text == ANSWER
        assert http.post("/generate", json={}).text == ANSWER


def starlette_frontend(context):
    """Streams ids as Starlette's documentation does, and watches for nothing."""

    async def generate(request):
        async def ids():
            params = SamplingParams(max_tokens=400, ignore_eos=True)
            stream = context.engine.generate("endless", [1, 2], params)
            try:
                async for output in stream:
                    yield f"{output.token_ids}\n"
            finally:
                stream.close()

        return StreamingResponse(ids())

    return Starlette(routes=[Route("/generate", generate)])


def test_a_client_that_leaves_ends_its_request_though_nobody_watches():
    with (
        Stack(factory=starlette_frontend) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        stack.engine.permits = Semaphore(1)
        with http.stream("GET", "/generate") as response:
            assert next(response.iter_text())
        stack.engine.wait_for(lambda: "endless" in stack.engine.aborted)
    assert stack.counts.finished == {"abort": 1}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("error", [RequestError("no", code="full", status=429), WorkerDied("x")])
def test_an_answer_that_has_begun_is_left_to_the_server(begun, error):
    sent = []

    async def app(scope, receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    async def send(message):
        sent.append(message.get("status"))

    running = answer_errors(app)({"type": "http"}, None, send)
    if begun:
        with pytest.raises(type(error)):
            asyncio.run(running)
        assert sent == [200]
    else:
        asyncio.run(running)
        assert sent == [getattr(error, "status", 500), None]
