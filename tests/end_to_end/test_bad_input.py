"""Bad input, in two tables: requests to a running server, and starts that must be refused.

Each row says what is sent and what the answer must name. A refused request disturbs nobody; a
refused start leaves nothing behind, prints no traceback and ends with status 2.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.support.server import Server, running_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
MAX_ERROR_BYTES = 4096


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "smollm2", "prompt": "Hi", "max_tokens": 2} | fields).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "smollm2", "messages": HELLO, "max_tokens": 2} | fields).encode()


# name: (path, body, status, what the message or param names)
REQUESTS: dict[str, tuple[str, bytes, int, str]] = {
    "malformed JSON": (CHAT, b'{"model": "smollm2", ', 400, "JSON"),
    "not an object": (CHAT, b"[1, 2]", 400, "object"),
    "20 MiB of JSON": (CHAT, b'{"model": "' + b"x" * (20 << 20) + b'"}', 413, "max_body_bytes"),
    "invalid UTF-8": (COMPLETIONS, b'{"model": "smollm2", "prompt": "\xff\xfe"}', 400, "UTF-8"),
    "NaN temperature": (
        COMPLETIONS,
        b'{"model": "smollm2", "prompt": "Hi", "temperature": NaN}',
        400,
        "",
    ),
    "negative temperature": (COMPLETIONS, completion(temperature=-1), 400, "temperature"),
    "temperature as text": (COMPLETIONS, completion(temperature="hot"), 400, "temperature"),
    "negative token id": (COMPLETIONS, completion(prompt=[1, -1]), 400, "prompt"),
    "huge token id": (COMPLETIONS, completion(prompt=[1, 10**9]), 400, "prompt"),
    "token id past 64 bits": (COMPLETIONS, completion(prompt=[2**70]), 400, "prompt"),
    "empty prompt": (COMPLETIONS, completion(prompt=""), 400, "prompt"),
    "empty token list": (COMPLETIONS, completion(prompt=[]), 400, "prompt"),
    "no messages": (CHAT, chat(messages=[]), 400, "messages"),
    "too long prompt": (COMPLETIONS, completion(prompt=[1] * 9000), 400, "8192"),
    "less than no tokens wanted": (COMPLETIONS, completion(max_tokens=-1), 400, "max_tokens"),
    "unknown model": (COMPLETIONS, completion(model="gpt-7"), 404, "gpt-7"),
    "unknown field": (COMPLETIONS, completion(temprature=1), 400, "temprature"),
    "n = 10^6": (COMPLETIONS, completion(n=10**6), 400, "n"),
    "n = 0": (CHAT, chat(n=0), 400, "n"),
    "too many stop strings": (CHAT, chat(stop=["a"] * 100), 400, "stop"),
    "too many logprobs": (CHAT, chat(logprobs=True, top_logprobs=10**4), 400, "top_logprobs"),
    "top_p above 1": (CHAT, chat(top_p=1.5), 400, "top_p"),
    "logit_bias of no token": (CHAT, chat(logit_bias={"99999999": 1}), 400, "logit_bias"),
    "unknown role field": (CHAT, chat(messages=[{"role": "user"}]), 400, "messages"),
    "unknown path": ("/v1/nothing", b"{}", 404, ""),
}


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("+model=smollm2", "frontend.strict_fields=true") as running:
        yield running
        assert running.stop() == 0


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request(name: str, server: Server) -> None:
    path, body, status, named = REQUESTS[name]
    response = httpx.post(server.url + path, content=body, headers=JSON, timeout=30)
    assert response.status_code == status, response.text
    assert len(response.content) <= MAX_ERROR_BYTES
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in error["message"] or named == error["param"], error


def test_server_still_answers(server: Server) -> None:
    body = chat(max_tokens=16, temperature=0)
    answer = httpx.post(server.url + CHAT, content=body, headers=JSON, timeout=30)
    assert answer.json()["choices"][0]["message"]["content"]
    gauges = httpx.get(f"{server.url}/metrics").text
    assert 'nodeweave_num_requests_running{model_name="smollm2"} 0.0' in gauges


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


def corrupt_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


def drop_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unchanged(folder: Path) -> None:
    assert (folder / "config.json").exists()


# name: (what is done to the folder, further arguments, what the error names)
STARTS: dict[str, tuple[Any, list[str], list[str]]] = {
    "truncated weights": (truncate, [], ["model.safetensors"]),
    "corrupt weights": (corrupt_header, [], ["model.safetensors"]),
    "missing tensor": (drop_tensor, [], ["model.layers.1.mlp.down_proj.weight"]),
    "tensor of another shape": (wrong_shape, [], ["model.norm.weight", "95", "96"]),
    "missing tokenizer": (drop_tokenizer, [], ["tokenizer.json"]),
    "malformed config": (bad_config, [], ["config.json"]),
    "folder that is not there": (unchanged, ["model.path=/no/such/folder"], ["/no/such/folder"]),
    "no memory for the KV pool": (
        unchanged,
        ["engine.kv_cache_tokens=1000000000000"],
        ["engine.kv_cache_tokens", "GiB"],
    ),
    "more ranks than heads": (unchanged, ["parallel.tp=3"], ["parallel.tp"]),
    "context beyond training": (
        unchanged,
        ["model.max_model_len=99999"],
        ["max_model_len", "99999"],
    ),
    "unknown backend": (unchanged, ["attention=nothing"], ["attention", "torch_ref"]),
    "exposed without a key": (
        unchanged,
        ["frontend.host=0.0.0.0"],
        ["frontend.host", "api_key_file"],
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_bad_start(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    damage, arguments, fragments = STARTS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_folder, folder)
    damage(folder)
    with running_server("+model=custom", f"model.path={folder}", *arguments) as server:
        assert server.wait(60) == 2, server.text
    assert "Traceback" not in server.text
    for fragment in fragments:
        assert fragment in server.text
