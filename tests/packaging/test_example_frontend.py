"""The example's frontend: its few lines answer, and core keeps what a stranger sends from it."""

import json
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import httpx
import pytest

from core.errors import ConfigError
from core.plugin.plugin_manager import PluginManager
from core.settings.config import PluginChoice
from tests.support.fake_engine import QueueTimeout
from tests.support.http_stack import ANSWER, MODEL, Stack

EXAMPLE = Path(__file__).parents[2] / "examples/acme_frontend"
KEY = {"authorization": "Bearer a-key"}
BODY = {"prompt": "hi there"}
ENDLESS = {**BODY, "ignore_eos": True, "max_tokens": 400}


def example():
    import acme_frontend

    return PluginManager.load(
        builtins=["plugins.frontends.openai"], objects={"acme": acme_frontend}
    ).table("frontend")


def options(**values):
    return PluginChoice(name="acme", options=values)


@pytest.fixture(scope="module", autouse=True)
def example_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        for name in [name for name in sys.modules if name.split(".")[0] == "acme_frontend"]:
            patch.delitem(sys.modules, name)
        yield


@pytest.fixture(scope="module")
def shared_stack(example_path):
    with Stack(
        api_key="a-key",
        factory=partial(example().create, options(default_max_tokens=300)),
        default_sampling={"temperature": 0.25, "top_k": 7},
        max_running_requests=1,
        max_queued_requests=1,
    ) as stack:
        yield stack


@pytest.fixture
def stack(shared_stack):
    shared_stack.reset()
    yield shared_stack
    shared_stack.engine.stepping.set()
    shared_stack.engine.wait_for(lambda: not shared_stack.engine.live)


@pytest.fixture
def http(stack):
    with httpx.Client(base_url=stack.url, timeout=20, headers=KEY) as http:
        yield http


def send_raw(stack, body):
    """A connection on which a request was sent."""
    host, port = stack.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = (
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-key\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def metric(http, name):
    """The sum over the series of a name."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_text_streams_with_the_models_defaults(stack, http):
    headers = {"x-request-id": "mine-1"}
    before = metric(http, "nodeweave_time_to_first_token_seconds_count")
    with http.stream("POST", "/generate", json=BODY, headers=headers) as response:
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        assert response.headers["x-request-id"] == "mine-1"
        assert "".join(response.iter_text()) == ANSWER
    [request] = stack.engine.seen
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.25, 7, 300)
    assert metric(http, "nodeweave_time_to_first_token_seconds_count") == before + 1


def test_stop_strings_are_text_that_is_not_sent(http):
    cut = http.post("/generate", json={**BODY, "stop": ["STOP"], "temperature": 0})
    assert cut.text == ANSWER[: ANSWER.index("STOP")]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"authorization": ""}, 401, "invalid_api_key"),
        ({"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"host": "evil.example"}, 403, "invalid_host"),
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-encoding": "br"}, 415, "unsupported_encoding"),
    ],
)
def test_strangers_are_refused(stack, http, headers, status, code):
    response = http.post("/generate", json=BODY, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert not stack.engine.seen


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"prompt": "\xff"}', "invalid_json", None),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json", "temperature"),
        (b"[" * 100_000, "invalid_type", None),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
        (b'{"prompt": ["a", "b"]}', "out_of_range", "prompt"),
        (b"{}", "missing_parameter", "prompt"),
        (b'{"prompt": {}}', "invalid_type", "prompt"),
        (b'{"prompt": ""}', "empty_prompt", "prompt"),
        (b'{"prompt": [99999999]}', "out_of_range", "prompt"),
        (b'{"prompt": [-1]}', "out_of_range", "prompt"),
        (json.dumps({"prompt": "hi " * 2000}).encode(), "context_length_exceeded", "prompt"),
        (json.dumps({"prompt": "x" * 2_000_000}).encode(), "context_length_exceeded", "prompt"),
        (b'{"prompt": "a", "temperature": "hot"}', "invalid_type", "temperature"),
        (b'{"prompt": "a", "temperature": -1}', "out_of_range", "temperature"),
        (b'{"prompt": "a", "max_tokens": 0}', "out_of_range", "max_tokens"),
        (b'{"prompt": "a", "logit_bias": {"99999999": 1}}', "out_of_range", "logit_bias"),
        (b'{"prompt": "a", "stop": [""]}', "out_of_range", "stop"),
    ],
)
def test_bad_bodies_are_named(stack, http, body, code, param):
    response = http.post("/generate", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
    assert len(response.content) < 4096
    assert not stack.engine.seen


def test_unknown_fields_are_named_and_counted(http):
    response = http.post("/generate", json={**BODY, "frobnicate": 1})
    assert response.text == ANSWER
    assert response.headers["x-nodeweave-ignored-fields"] == "frobnicate"
    assert 'nodeweave_ignored_fields_total{field="frobnicate"} 1.0' in http.get("/metrics").text


def test_a_full_queue_is_429(stack, http):
    stack.engine.stepping.clear()
    waiting = [send_raw(stack, BODY) for _ in range(2)]
    stack.engine.wait_for(lambda: len(stack.engine.live) == 2)
    refused = http.post("/generate", json=BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "queue_full"
    stack.engine.stepping.set()
    for connection in waiting:
        with connection:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")


def test_a_client_that_leaves_in_mid_stream_is_aborted(stack, http):
    stack.engine.permits = threading.Semaphore(1)
    with http.stream("POST", "/generate", json=ENDLESS) as response:
        assert next(response.iter_text())
        [request] = stack.engine.seen
    stack.engine.wait_for(lambda: request.request_id in stack.engine.aborted)


def test_what_is_given_up_before_the_first_token_has_its_status(stack, http):
    stack.engine.reply = lambda request: QueueTimeout("too much to do")
    response = http.post("/generate", json=BODY)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "queue_timeout"


def test_probes_and_metrics_are_there_and_other_routes_are_not(http):
    assert http.get("/ready").json() == {"status": "ready"}
    assert f'nodeweave_engine_alive{{model_name="{MODEL}"}} 1.0' in http.get("/metrics").text
    assert http.get("/v1/models").status_code == 404
    assert http.get("/generate").status_code == 405


def test_an_answer_that_loses_its_engine_is_not_whole(example_path):
    with (
        Stack(factory=partial(example().create, options())) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        stack.engine.permits = threading.Semaphore(1)
        with http.stream("POST", "/generate", json=ENDLESS) as response:
            texts = response.iter_text()
            assert next(texts)
            stack.call(stack.client.engine_died, "worker 1 was killed by signal 9")
            with pytest.raises(httpx.RemoteProtocolError):
                list(texts)
        assert http.get("/health").status_code == 503
        assert http.post("/generate", json=BODY).status_code == 503
    assert stack.records[0].code == "engine_dead"


def test_its_options_are_checked(example_path):
    with pytest.raises(ConfigError, match="default_max_tokens=0 is out of range"):
        example().create(options(default_max_tokens=0), None)
