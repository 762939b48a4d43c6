"""The main job as a user runs it: start, ask, stop, and what happens when a process dies."""

import os
import signal
import socket
import threading
import time

import httpx
import openai
import psutil
import pytest

from tests.support.server import Server, running_server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(server: Server, **fields: object) -> str:
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0} | fields
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_start_ask_stop() -> None:
    """The printed curl line names the URL and the model; SIGTERM ends with status 0."""
    with running_server("+model=smollm2", threads=None) as server:
        assert "Paris" in ask(server)
        assert "curl" in server.text
        assert "smollm2" in server.text
        processes = server.children()
        assert set(processes) == {"frontend", "worker"}
        assert server.stop() == 0
        assert not any(process.is_running() for process in processes.values())


def test_tensor_parallel_server_answers_the_same() -> None:
    """Three real processes over gloo give the text that one gives."""
    with running_server("+model=smollm2", "model.dtype=float32") as server:
        alone = ask(server, max_tokens=24)
        assert server.stop() == 0
    with running_server("+model=smollm2", "model.dtype=float32", "parallel.tp=3") as server:
        assert set(server.children()) == {"frontend", "worker", "worker 1", "worker 2"}
        assert ask(server, max_tokens=24) == alone
        assert server.stop() == 0


@pytest.mark.parametrize("victim", ["worker", "worker 2"])
def test_dead_worker_ends_streams_and_everything_else(victim: str) -> None:
    """Every open stream gets an error event; nothing is left; the status is not 0."""
    with running_server("+model=smollm2", "parallel.tp=3") as server:
        processes = server.children()
        stream = client(server).completions.create(
            model="smollm2",
            prompt="Once",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        died_s = time.monotonic()
        processes[victim].kill()
        with pytest.raises(openai.APIError, match="worker"):
            for _ in stream:
                pass
        assert time.monotonic() - died_s < 2
        assert server.wait(5) == 1
        assert "SIGKILL" in server.text
        psutil.wait_procs(processes.values(), timeout=2)
        assert not any(process.is_running() for process in processes.values())


def test_children_end_with_a_killed_parent() -> None:
    with running_server("+model=smollm2") as server:
        processes = list(server.children().values())
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive


def test_sigterm_finishes_what_runs() -> None:
    with running_server("+model=smollm2") as server:
        stream = client(server).completions.create(
            model="smollm2",
            prompt="Once",
            max_tokens=60,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        events = iter(stream)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        rest = list(events)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.wait(30) == 0


def test_port_in_use_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_server("+model=smollm2", f"frontend.port={port}") as server:
            assert server.wait(30) == 2
        assert f"{port}" in server.text
        assert "Traceback" not in server.text


def test_concurrent_requests_do_not_disturb_each_other() -> None:
    """Answers of 16 clients at once equal those given alone; one of them is refused meanwhile."""
    questions = [f"Count from {start} to {start + 5}:" for start in range(16)]
    with running_server("+model=smollm2", "model.dtype=float32") as server:
        api = client(server)

        def complete(prompt: str) -> str:
            answer = api.completions.create(
                model="smollm2", prompt=prompt, max_tokens=12, temperature=0
            )
            return answer.choices[0].text

        alone = [complete(question) for question in questions]
        together = [""] * len(questions)

        def run(index: int) -> None:
            together[index] = complete(questions[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        with pytest.raises(openai.BadRequestError):
            api.completions.create(model="smollm2", prompt=[10**9], max_tokens=4)
        for thread in threads:
            thread.join()
        assert together == alone
        assert server.stop() == 0
