"""The frontend process as its parent sees it: real pipes, a fake engine."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import msgspec
import pytest

from core.cluster.processes.boot import FrontendBoot, Served
from core.cluster.processes.channel import STATUS_FD_VARIABLE
from core.interfaces.control import (
    ChildStatus,
    Drain,
    EngineDied,
    EngineReady,
    Failed,
    LinesDropped,
    ModelFiles,
    Ready,
    StartPhase,
)
from core.serve.process import check_exposure, read_api_key
from core.settings.config import AppConfig, FrontendConfig, LaunchConfig, ModelConfig
from tests.support.fake_engine import FakeEngine, endpoints_in
from tests.support.http_stack import ANSWER
from tests.support.small_tokenizer import write_folder

BODY = {"messages": [{"role": "user", "content": "hi"}]}


class Process:
    """A frontend process and the parent's ends of its pipes."""

    def __init__(self, folder, *, environment=None, **frontend):
        self.endpoints = endpoints_in(folder)
        boot = FrontendBoot(
            config=AppConfig(
                model=ModelConfig(name="m"),
                frontend=FrontendConfig(**({"port": 0} | frontend)),
                launch=LaunchConfig(shutdown_grace_s=20),
            ),
            endpoints=self.endpoints,
            files=ModelFiles(
                hf_config={}, weight_files=[], weight_format="dummy",
                tokenizer_dir=str(write_folder(folder / "tokenizer")), eos_ids=[2],
                default_sampling={},
            ),
            served=Served(name="m", max_model_len=512, vocab_size=421, info={"a": 1}),
        )  # fmt: skip
        read_fd, write_fd = os.pipe()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "core.serve.process"],
            stdin=subprocess.PIPE,
            pass_fds=[write_fd],
            env={**os.environ, STATUS_FD_VARIABLE: str(write_fd), **(environment or {})},
        )
        os.close(write_fd)
        self.statuses = []
        self._pipe = os.fdopen(read_fd, "rb")
        self.send(boot)

    def send(self, message):
        self._popen.stdin.write(msgspec.json.encode(message) + b"\n")
        self._popen.stdin.flush()

    def wait_status(self, kind):
        """The first status of a kind."""
        for line in self._pipe:
            self.statuses.append(msgspec.json.decode(line, type=ChildStatus))
            if isinstance(self.statuses[-1], kind):
                return self.statuses[-1]
        raise AssertionError(f"it ended with {self._popen.wait(10)} after {self.statuses}")

    def close_control(self):
        self._popen.stdin.close()

    def signal(self, number):
        self._popen.send_signal(number)

    def wait(self):
        return self._popen.wait(15)

    def close(self):
        self._popen.kill()
        self._popen.wait()
        self._pipe.close()


@pytest.fixture
def start(tmp_path):
    """Starts processes that end with the test."""
    running = []

    def start_one(**arguments):
        running.append(Process(tmp_path, **arguments))
        return running[-1]

    yield start_one
    for process in running:
        process.close()


@pytest.fixture
def serving(start, tmp_path):
    """(process, fake engine, client) ready to answer; the engine holds its steps."""
    process = start()
    answer_ids = []
    engine = FakeEngine(process.endpoints, lambda _: answer_ids).start()
    process.send(EngineReady({"dtype": "float32"}))
    with httpx.Client(base_url=process.wait_status(Ready).info["url"], timeout=20) as http:
        assert http.get("/ready").status_code == 200
        answer_ids += http.post("/tokenize", json={"prompt": ANSWER}).json()["tokens"]
        yield process, engine, http
    engine.stop()


@contextmanager
def engine_of(process):
    """An engine that is ready, behind a frontend nobody asks for answers."""
    engine = FakeEngine(process.endpoints, lambda _: []).start()
    process.send(EngineReady({}))
    yield
    engine.stop()


def in_background(function):
    """Run in a thread; returns a function that waits for the result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()

    def result():
        thread.join(15)
        return results[0]

    return result


def test_imports_neither_torch_nor_transformers():
    code = (
        "import sys, core.serve.process, plugins.frontends._openai.app;"
        "heavy = {'torch', 'transformers', 'hydra', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_life_from_ready_to_drained(serving):
    process, engine, http = serving
    kinds = [type(status) for status in process.statuses]
    assert kinds == [StartPhase, Ready]
    assert process.statuses[-1].info["needs_key"] is False
    response = http.post("/v1/chat/completions", json=BODY)
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    process.send(Drain(20.0))
    while http.get("/ready").status_code == 200:
        pass
    assert http.get("/ready").json()["error"]["code"] == "draining"
    assert http.post("/v1/chat/completions", json=BODY).status_code == 503
    engine.stepping.set()
    assert running().json()["choices"][0]["message"]["content"] == ANSWER
    assert process.wait() == 0


def test_grace_time_over(serving):
    process, engine, http = serving
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    process.send(Drain(0.2))
    response = running()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert response.headers["retry-after"]
    assert process.wait() == 0


def test_sigterm_drains_and_ctrl_c_is_the_parents(serving):
    process, engine, http = serving
    process.signal(signal.SIGINT)
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    process.signal(signal.SIGTERM)
    while http.get("/ready").status_code == 200:
        pass
    engine.stepping.set()
    assert running().status_code == 200
    assert process.wait() == 0


def test_engine_died(serving):
    process, engine, http = serving
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    begin = time.monotonic()
    process.send(EngineDied("worker 0 was killed"))
    response = running()
    assert time.monotonic() - begin < 1
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_dead")
    assert process.wait() == 1
    assert time.monotonic() - begin < 3


def test_a_dead_worker_is_found_without_the_parent_s_word(serving):
    """The parent (here: this test) says nothing, as one that was stopped would."""
    process, engine, http = serving
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    process.send(EngineReady({}, {"worker 0": worker.pid}))
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    worker.kill()
    response = running()
    worker.wait()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_dead")
    assert f"worker 0 (pid {worker.pid}) ended, and the parent process" in response.text
    assert http.get("/health").status_code == 503
    process.send(EngineDied("worker 0 was killed"))  # it goes on again
    assert process.wait() == 1


def test_log_lines_that_other_processes_dropped_are_counted(serving):
    process, _, http = serving
    line = 'nodeweave_log_lines_dropped_total{model_name="m"} '
    assert line + "0.0" in http.get("/metrics").text
    process.send(LinesDropped(3))
    process.send(EngineReady({}))
    while line + "3.0" not in http.get("/metrics").text:
        pass


def test_the_end_of_the_parent_is_the_end_and_clients_are_told(serving):
    """However it ended (kill -9, out of memory): all that comes of it here is the end of a pipe."""
    process, engine, http = serving
    engine.stepping.clear()
    running = in_background(lambda: http.post("/v1/chat/completions", json=BODY))
    engine.wait_for(lambda: len(engine.live) == 1)
    process.close_control()
    assert running().json()["error"]["code"] == "engine_dead"
    assert process.wait() == 1


def test_port_in_use_is_told_within_a_second_of_being_up(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(port=port)
        failed = process.wait_status(Failed)
    assert failed.kind == "ResourceError"
    assert f"frontend.port={port} on 127.0.0.1 is in use by pid {os.getpid()}" in failed.message
    assert process.statuses == [failed], "found before anything slow"
    assert process.wait() == 2


def test_no_anonymous_access_from_other_machines(start, tmp_path):
    process = start(host="0.0.0.0")
    failed = process.wait_status(Failed)
    assert failed.kind == "ConfigError"
    assert "frontend.allow_anonymous" in failed.message
    assert process.wait() == 2
    key_file = tmp_path / "key"
    key_file.write_text("secret\n")
    process = start(host="0.0.0.0", api_key_file=str(key_file))
    with engine_of(process):
        ready = process.wait_status(Ready)
    assert ready.info["needs_key"] is True
    port = ready.info["url"].rsplit(":", 1)[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        assert http.get("/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret", "host": "any.name"}
        assert http.get("/v1/models", headers=headers).status_code == 200


THIRD_PARTY = """
from core.plugin.hookspecs import Registration, hookimpl

@hookimpl
def register_frontend():
    return [Registration(name="acme", factory=lambda options, context: application)]

async def application(scope, receive, send):
    if scope["type"] == "http":
        size = 0
        while (message := await receive())["type"] == "http.request":
            size += len(message["body"])
            if not message["more_body"]:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"acme got %d" % size})
                return
"""


def test_any_frontend_is_guarded_and_bounded(start, tmp_path):
    """One that knows nothing of keys, hosts, origins or sizes."""
    (tmp_path / "acme.py").write_text(THIRD_PARTY)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nodeweave]\nacme = acme\n")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    key = {"authorization": "Bearer secret"}
    for environment in ({"NODEWEAVE_API_KEY": "secret"}, {}):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = start(name="acme", max_body_bytes=1024, environment=environment)
        with engine_of(process):
            url = process.wait_status(Ready).info["url"]
        with httpx.Client(base_url=url, timeout=20) as http:
            if "NODEWEAVE_API_KEY" in environment:
                assert http.post("/any", content=b"abc").status_code == 401
            assert http.post("/any", content=b"abc", headers=key).text == "acme got 3"
            assert http.post("/any", content=b"x" * 1025, headers=key).status_code == 413
            rebound = {**key, "host": "evil.example"}
            assert http.get("/any", headers=rebound).status_code == 403
            foreign = {"origin": "http://evil.example", "content-type": "text/plain"}
            answer = http.post("/any", content=b"abc", headers=foreign)
            assert answer.status_code in (401, 403)
            assert "acme" not in answer.text
        process.close()  # and with it the address that the next one's engine comes to


def test_a_missing_tokenizer_and_an_unknown_frontend_are_told(start, tmp_path):
    process = start(name="opnai")
    failed = process.wait_status(Failed)
    assert (failed.kind, process.wait()) == ("PluginError", 2)
    assert "openai" in failed.message


def test_keys_come_from_the_file_then_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NODEWEAVE_API_KEY", "from-environment")
    assert read_api_key(FrontendConfig()) == "from-environment"
    (tmp_path / "key").write_text(" from-file \n")
    assert read_api_key(FrontendConfig(api_key_file=str(tmp_path / "key"))) == "from-file"
    (tmp_path / "key").write_text("\n")
    from core.errors import ConfigError

    for path in ("key", "missing"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_api_key(FrontendConfig(api_key_file=str(tmp_path / path)))
    check_exposure(FrontendConfig(host="0.0.0.0", allow_anonymous=True), None)
    check_exposure(FrontendConfig(host="::1"), None)
