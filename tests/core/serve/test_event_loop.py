"""No body that is allowed keeps the frontend's event loop for long: its own watchdog says so.

The real process, because a test's process has another heap; CPU time of the loop's thread, which
does not depend on what else the machine does."""

import json
import os
import subprocess
import sys

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.cluster.processes.boot import FrontendBoot, Served
from core.cluster.processes.channel import STATUS_FD_VARIABLE
from core.interfaces.control import ChildStatus, EngineReady, ModelFiles, Ready
from core.settings.config import AppConfig, FrontendConfig, ModelConfig
from tests.support.fake_engine import FakeEngine, endpoints_in
from tests.support.small_tokenizer import write_folder
from tests.support.template_manners import MANNERS

BOUND_S = 0.02
BODY = 8 * 1024 * 1024 - 1024
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def frontend(tmp_path_factory):
    """A client of a frontend process with a model of a long context."""
    folder = tmp_path_factory.mktemp("loop")
    endpoints = endpoints_in(folder)
    written = write_folder(folder / "tokenizer", template=MANNERS["qwen2.5"])
    boot = FrontendBoot(
        config=AppConfig(model=ModelConfig(name="m"), frontend=FrontendConfig(port=0)),
        endpoints=endpoints,
        files=ModelFiles(
            hf_config={}, weight_files=[], weight_format="dummy", tokenizer_dir=str(written),
            eos_ids=[2], default_sampling={},
        ),
        served=Served(name="m", max_model_len=300_000, vocab_size=500),
    )  # fmt: skip
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "core.serve.process"],
        stdin=subprocess.PIPE,
        pass_fds=[write_fd],
        env={**os.environ, STATUS_FD_VARIABLE: str(write_fd)},
    )
    os.close(write_fd)
    engine = FakeEngine(endpoints, lambda _: [100] * 4000).start()
    try:
        with os.fdopen(read_fd, "rb") as statuses:
            for message in (boot, EngineReady({})):
                process.stdin.write(msgspec.json.encode(message) + b"\n")
            process.stdin.flush()
            decoded = (msgspec.json.decode(line, type=ChildStatus) for line in statuses)
            ready = next(status for status in decoded if isinstance(status, Ready))
            with httpx.Client(base_url=ready.info["url"], timeout=120) as client:
                while client.get("/ready").status_code != 200:
                    pass
                yield client
    finally:
        process.kill()
        process.wait()
        engine.stop()


def blocked(client):
    """Bound -> times that the loop was kept for longer."""
    page = client.get("/metrics").text
    [family] = [
        one for one in text_string_to_metric_families(page)
        if one.name == "nodeweave_event_loop_blocked_seconds"
    ]  # fmt: skip
    counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    return {float(bound): counts["+Inf"] - count for bound, count in counts.items()}


def repeat(item, size=BODY):
    return b",".join([item] * (size // (len(item) + 1)))


def chat(content=b"[]", **fields):
    """A chat's body with raw JSON fields."""
    fields = {"messages": content, "max_tokens": b"1"} | fields
    return b"{" + b",".join(b'"%b":%b' % (n.encode(), v) for n, v in fields.items()) + b"}"


ONE = json.dumps(USER).encode()
# name -> (route, body, status)
BODIES = {
    "a long text": (
        CHAT, lambda: chat(b'[{"role":"user","content":"%b"}]' % (b"word " * 60_000)), 200,
    ),
    "a text beyond the context": (
        CHAT, lambda: chat(b'[{"role":"user","content":"%b"}]' % (b"x" * (BODY - 200))), 400,
    ),
    "characters as escapes": (
        CHAT, lambda: chat(b'[{"role":"user","content":"%b"}]' % (rb"\u00e9" * 200_000)), 400,
    ),
    "many messages": (
        CHAT, lambda: chat(b"[" + repeat(b'{"role":"user","content":"x"}', 400_000) + b"]"), 200,
    ),
    "brackets for messages": (CHAT, lambda: chat(b"[" + repeat(b"[]") + b"]"), 400),
    "large tools": (
        CHAT,
        lambda: chat(ONE, tools=b"[%b]" % repeat(b'{"type":"function"}', 700_000)),
        400,
    ),
    "brackets for tools": (CHAT, lambda: chat(ONE, tools=b"[{},[%b]]" % repeat(b"[]")), 400),
    "a call's arguments": (
        CHAT,
        lambda: chat(
            b'[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"%b"}}]}]'
            % (b" " * (BODY - 200))
        ),
        400,
    ),
    "brackets to ignore": (CHAT, lambda: chat(ONE, metadata=b"[" + repeat(b"[]") + b"]"), 200),
    "biases": (
        CHAT,
        lambda: chat(ONE, logit_bias=b"{%b}" % b",".join(b'"%d":1' % i for i in range(700_000))),
        400,
    ),
    "stop strings": (CHAT, lambda: chat(ONE, stop=b"[" + repeat(b'"a"') + b"]"), 400),
    "unknown fields": (
        CHAT,
        lambda: chat(ONE, **{f"k{i}": b"1" for i in range(600_000)}),
        200,
    ),
    "a deep body": (CHAT, lambda: chat(ONE, metadata=b"[" * (BODY // 2)), 400),
    "no JSON": (CHAT, lambda: b"{" * BODY, 400),
    "a batch of texts": (
        COMPLETIONS, lambda: b'{"max_tokens":1,"prompt":[' + b",".join(
            [b'"%b"' % (b"word " * 800)] * 256) + b"]}", 200,
    ),
    "token ids": (
        COMPLETIONS, lambda: b'{"max_tokens":1,"prompt":[' + repeat(b"7", 500_000) + b"]}", 200,
    ),
    "too many token ids": (COMPLETIONS, lambda: b'{"prompt":[' + repeat(b"7") + b"]}", 400),
    "64 answers of a long prompt": (
        COMPLETIONS, lambda: b'{"max_tokens":1,"n":64,"prompt":[%b]}' % repeat(b"7", 60_000), 200,
    ),
    "tokens of a long text": (
        "/tokenize",
        lambda: b'{"return_token_strs":true,"prompt":"%b"}' % (b"x" * 500_000),
        200,
    ),
    "text of many tokens": ("/detokenize", lambda: b'{"tokens":[%b]}' % repeat(b"7", 900_000), 200),
    "log-probabilities of an answer": (
        CHAT, lambda: chat(ONE, max_tokens=b"4000", logprobs=b"true", top_logprobs=b"20"), 200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_the_event_loop_is_not_kept(frontend, name):
    route, make, status = BODIES[name]
    body = make()
    assert len(body) <= 8 * 1024 * 1024
    before = blocked(frontend)
    response = frontend.post(route, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text[:500]
    after = blocked(frontend)
    longer = {bound: after[bound] - before[bound] for bound in after}
    assert longer[BOUND_S] == 0, longer


def test_the_watchdog_sees_what_it_should(frontend):
    found = blocked(frontend)
    assert found[0.001] > 0
    assert found[float("inf")] == 0
