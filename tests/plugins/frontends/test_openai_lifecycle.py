"""What happens around answers: disconnects, full queues, draining, a dead engine, keys, hosts."""

import json
import socket

import httpx
import pytest

from core.errors import WorkerDied
from core.interfaces.frontend import EngineState
from core.serve.process import shutting_down
from tests.support.fake_engine import QueueTimeout
from tests.support.http_stack import ANSWER, MODEL, Stack

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
ENDLESS = {**BODY, "ignore_eos": True, "max_tokens": 400}


def post_raw(stack, body, path=CHAT):
    """A connection with a request sent, nothing read."""
    host, port = stack.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    connection.sendall(head.encode() + payload)
    return connection


def read_until(connection, mark):
    data = b""
    while mark not in data:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended before {mark!r}: {data[-500:]!r}"
        data += chunk
    return data


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted_at_once(stack, stream, n):
    stack.engine.steps_per_second = 50  # 400 tokens would take 8 s
    connection = post_raw(stack, {**ENDLESS, "stream": stream, "n": n})
    stack.engine.wait_for(lambda: len(stack.engine.live) == n)
    if stream:
        read_until(connection, b'"content":"The"')
    connection.close()
    stack.engine.wait_for(lambda: len(stack.engine.aborted) == n, timeout_s=2)
    assert stack.call(lambda: stack.client.num_live) == 0


def test_a_client_that_leaves_before_the_first_token(stack):
    stack.engine.stepping.clear()
    connection = post_raw(stack, {**BODY, "stream": True})
    stack.engine.wait_for(lambda: len(stack.engine.live) == 1)
    connection.close()
    stack.engine.wait_for(lambda: len(stack.engine.aborted) == 1, timeout_s=2)


def test_a_slow_reader_costs_no_memory_and_loses_nothing(stack):
    connection = post_raw(stack, {**ENDLESS, "stream": True})
    stack.engine.wait_for(lambda: bool(stack.engine.seen) and not stack.engine.live)
    data = read_until(connection, b"[DONE]")
    connection.close()
    # An event is one JSON text; the HTTP chunk sizes between them are no part of it.
    lines = [line for line in data.split(b"\r\n") if b"data: {" in line]
    events = [
        json.loads(event.removeprefix(b"data: "))
        for line in lines
        for event in line.split(b"\n\n")
        if event.startswith(b"data: {")
    ]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == (ANSWER * 400)[: len(text)]
    assert len(text) > 300


def test_full_queue_is_429_with_retry_after():
    with (
        Stack(max_running_requests=1, max_queued_requests=1) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        stack.engine.stepping.clear()
        waiting = [post_raw(stack, BODY) for _ in range(2)]
        stack.engine.wait_for(lambda: len(stack.engine.live) == 2)
        stack.text.chat = None  # a full queue is known before anything is rendered or tokenized
        response = http.post(CHAT, json=BODY)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        del stack.text.chat
        stack.engine.stepping.set()
        for connection in waiting:
            assert ANSWER.encode() in read_until(connection, b"usage")
            connection.close()
        assert http.post(CHAT, json=BODY).status_code == 200


def test_engine_death_ends_streams_with_an_error_event():
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        stack.engine.steps_per_second = 50  # 400 tokens would take 8 s
        streaming = post_raw(stack, {**ENDLESS, "stream": True})
        read_until(streaming, b'"content":"The"')
        stack.engine.stepping.clear()
        whole = post_raw(stack, ENDLESS)
        stack.engine.wait_for(lambda: len(stack.engine.seen) == 2)
        stack.call(stack.client.engine_died, "worker 1 was killed by signal 9")
        events = read_until(streaming, b"0\r\n\r\n")
        error = json.loads(events.split(b"data: ")[-1].split(b"\n\n")[0])["error"]
        assert error["code"] == "engine_dead"
        assert "worker 1 was killed" in error["message"]
        assert b"[DONE]" not in events
        answer = read_until(whole, b"killed")
        assert answer.startswith(b"HTTP/1.1 500")
        for path, status in (("/health", 503), ("/ready", 503), ("/metrics", 200)):
            assert http.get(path).status_code == status, path
        refused = http.post(CHAT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert refused.headers["retry-after"]
        streaming.close()
        whole.close()


def test_ready_only_while_serving():
    with (
        Stack(serving=False) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json()["error"]["code"] == "starting"
        refused = http.post(CHAT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_starting")
        stack.engine.start()
        while "pages 100.0" not in (page := pages_of(http)):
            assert page == "pages 0.0"
        assert http.get("/ready").json()["error"]["code"] == "starting", "gauges alone"
        assert http.get("/server_info").json()["state"] == "starting"
        stack.call(stack.client.engine_ready, {"dtype": "float32"})
        assert http.get("/ready").status_code == 200
        info = http.get("/server_info").json()
        assert (info["state"], info["engine"]) == ("serving", {"dtype": "float32"})


def pages_of(http):
    """What /metrics says of the pool."""
    lines = http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("nodeweave_kv_cache_pages{")]
    return f"pages {line.split()[-1]}"


def test_draining_finishes_what_runs_and_refuses_the_rest():
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        stack.engine.stepping.clear()
        running = post_raw(stack, {**BODY, "stream": True})
        stack.engine.wait_for(lambda: len(stack.engine.live) == 1)
        stack.call(stack.client.drain)
        assert stack.client.state is EngineState.DRAINING
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        refused = http.post(CHAT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        stack.engine.stepping.set()
        assert b"[DONE]" in read_until(running, b"0\r\n\r\n")
        running.close()


def test_failing_all_streams_aborts_them_in_the_engine(stack):
    stack.engine.steps_per_second = 50
    connection = post_raw(stack, {**ENDLESS, "stream": True})
    read_until(connection, b'"content":"The"')
    stack.call(stack.client.fail_all, shutting_down)
    assert b'"code":"shutting_down"' in read_until(connection, b"0\r\n\r\n")
    stack.engine.wait_for(lambda: len(stack.engine.aborted) == 1, timeout_s=2)
    connection.close()


KEY = "sekrét-key"


@pytest.fixture(scope="module")
def keyed():
    with Stack(api_key=KEY) as stack:
        yield stack


def bearer(key):
    return {"authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
        ("POST", CHAT),
        ("POST", COMPLETIONS),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/metrics"),
        ("GET", "/server_info"),
        ("GET", "/docs"),
        ("GET", "/health/"),
        ("GET", "/ready/../metrics"),
        ("GET", "/%68ealth/x"),
    ],
)
def test_every_route_but_two_needs_the_key(keyed, method, path):
    with httpx.Client(base_url=keyed.url, timeout=20) as http:
        for headers in ({}, bearer("wrong"), {"authorization": KEY.encode()}, bearer(KEY + "x")):
            response = http.request(method, path, headers=headers)
            assert response.status_code == 401, headers
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in response.text
        assert http.request(method, path, headers=bearer(KEY)).status_code != 401


def test_open_routes_and_odd_keys(keyed):
    with httpx.Client(base_url=keyed.url, timeout=20) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        for value in (b"Bearer \xff\xfe", b"Basic " + KEY.encode(), b"Bearer", b""):
            assert http.get("/v1/models", headers={"authorization": value}).status_code == 401
        twice = [("authorization", b"Bearer x"), ("authorization", b"Bearer " + KEY.encode())]
        assert http.get("/v1/models", headers=twice).status_code == 401
        lower = {"authorization": b"bearer " + KEY.encode()}
        assert http.get("/v1/models", headers=lower).status_code == 200
        assert http.get("/server_info", headers=bearer(KEY)).text.find(KEY) == -1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:5", 200),
        ("ours.example:30000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_host_header_on_loopback(host, status):
    with (
        Stack(allowed_hosts=["ours.example"], serving=False) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        assert http.get("/health", headers={"host": host}).status_code == status


def test_metrics_tell_what_happened():
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        http.post(CHAT, json=BODY)
        http.post(CHAT, json={**BODY, "max_tokens": 2})
        http.post(CHAT, json={**BODY, "n": 0})
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    label = f'model_name="{MODEL}"'
    assert float(lines[f'nodeweave_request_success_total{{finished_reason="stop",{label}}}']) == 1
    assert float(lines[f'nodeweave_request_success_total{{finished_reason="length",{label}}}']) == 1
    assert float(lines[f"nodeweave_time_to_first_token_seconds_count{{{label}}}"]) == 2
    tokens = len(stack.answer_ids) + 1 + 2
    assert float(lines[f"nodeweave_inter_token_latency_seconds_count{{{label}}}"]) <= tokens - 2
    assert float(lines[f"nodeweave_e2e_request_latency_seconds_count{{{label}}}"]) == 2
    assert float(lines[f'nodeweave_http_responses_total{{route="{CHAT}",status="200"}}']) == 2
    assert float(lines[f'nodeweave_http_responses_total{{route="{CHAT}",status="400"}}']) == 1
    assert float(lines['nodeweave_http_refusals_total{code="out_of_range"}']) == 1
    assert float(lines[f"nodeweave_http_connections{{{label}}}"]) == 1
    assert float(lines[f"nodeweave_kv_cache_pages{{{label}}}"]) == 100
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"nodeweave_{name}{{{label}}}" in lines
    for name in ("prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_hits"):
        assert f"nodeweave_{name}_total{{{label}}}" in lines
    assert "nodeweave_dp_" not in page.text, "there is one DP rank"


def test_metrics_of_several_dp_ranks_are_told_together_and_apart():
    with Stack(num_dp=2) as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        for _ in range(3):
            http.post(CHAT, json=BODY).raise_for_status()
        page = http.get("/metrics").text
    assert [len(engine.seen) for engine in stack.engines] == [2, 1]
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(lines[f'nodeweave_kv_cache_pages{{model_name="{MODEL}"}}']) == 200
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_pages_free"):
        for dp_rank in (0, 1):
            assert f'nodeweave_dp_{name}{{dp_rank="{dp_rank}",model_name="{MODEL}"}}' in lines


def test_server_info_holds_no_paths(http, stack):
    info = http.get("/server_info").json()
    assert info["model"] == MODEL
    assert info["limits"]["max_n"] == 64
    assert "/" not in json.dumps({key: info[key] for key in ("info", "limits")})


def test_worker_died_is_an_internal_error_for_those_it_hit():
    from core.frontend.errors import as_request_error

    assert as_request_error(WorkerDied("x")).status == 500
    assert "secret" not in str(as_request_error(ValueError("secret")))


def test_priority_and_time_in_the_queue_reach_the_engine(stack, http):
    body = {"model": MODEL, "prompt": "hi", "n": 2, "priority": -3}
    assert http.post("/v1/completions", json=body).status_code == 200
    chat = {"messages": [{"role": "user", "content": "hi"}], "priority": 7}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    http.post("/v1/completions", json={"prompt": "hi"})
    assert [request.priority for request in stack.engine.seen] == [-3, -3, 7, 0]
    refused = http.post("/v1/completions", json=body | {"priority": 2**31})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


@pytest.mark.parametrize("stream", [False, True])
def test_who_waited_too_long_may_come_back(stack, http, stream):
    stack.engine.reply = lambda request: QueueTimeout("too much to do")
    body = {"prompt": "hi", "stream": stream}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_timeout"
    assert int(response.headers["retry-after"]) > 0
