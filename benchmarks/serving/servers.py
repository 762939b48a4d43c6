"""Starts servers of ours and of peers on one model with made-up weights, one at a time.

A server is a command in a process group of its own. Knows nothing of loads.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
STOP_S = 10.0
POLL_S = 0.1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one. `environment` is beside this process's own."""

    name: str
    command: list[str]
    environment: dict[str, str]
    ready_path: str


class StartError(Exception):
    """A server ended, or was not ready in time; the message has the end of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def ours(name: str, folder: Path, longest: int, words: Sequence[str]) -> Callable[[int], Server]:
    """As a user starts it; `words` are keys of the configuration."""

    def at(port: int) -> Server:
        command = [
            *(sys.executable, "-m", "core.run", "+model=custom"),
            f"model.path={folder}",
            *(f"model.name={folder.name}", "model.load_format=dummy"),
            f"model.max_model_len={longest}",
            f"frontend.port={port}",
            *words,
        ]
        return Server(name, command, {}, "/ready")

    return at


def vllm(name: str, folder: Path, longest: int, python: str) -> Callable[[int], Server]:
    """`python`: the peer's, after variables of its environment and before options of the server:
    `PYTHONPATH=/tmp/site python3 -- --max-num-seqs 512`."""
    environment, interpreter, options = peer_words(python)

    def at(port: int) -> Server:
        command = [
            *(*interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", folder.name, "--load-format", "dummy"),
            *("--max-model-len", str(longest), "--host", HOST, "--port", str(port)),
            *("--disable-uvicorn-access-log", *options),
        ]
        return Server(name, command, environment, "/health")

    return at


def sglang(name: str, folder: Path, longest: int, python: str) -> Callable[[int], Server]:
    """As `vllm`."""
    environment, interpreter, options = peer_words(python)

    def at(port: int) -> Server:
        command = [
            *(*interpreter, "-m", "sglang.launch_server", "--model-path", str(folder)),
            *("--served-model-name", folder.name, "--load-format", "dummy"),
            *("--context-length", str(longest), "--host", HOST, "--port", str(port)),
            *options,
        ]
        return Server(name, command, environment, "/health_generate")

    return at


PEERS = {"vllm": vllm, "sglang": sglang}


def peer_words(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """(variables, interpreter, options of the server) of a peer's command."""
    words = shlex.split(text)
    environment: dict[str, str] = {}
    while words and "=" in words[0] and not words[0].startswith(("-", "/")):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    if "--" in words:
        split = words.index("--")
        return environment, words[:split], words[split + 1 :]
    return environment, words, []


@contextlib.contextmanager
def running(
    server_at: Callable[[int], Server], log_folder: Path, until: float
) -> Iterator[tuple[int, float]]:
    """Start a server; its port and the seconds until it was ready. It and all it started are gone
    afterwards. Raises StartError; `until` is of `time.perf_counter`."""
    port = free_port()
    server = server_at(port)
    log = log_folder / f"{server.name}.log"
    begin = time.perf_counter()
    with log.open("a") as out:
        process = subprocess.Popen(
            server.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | server.environment,
            start_new_session=True,
        )
    try:
        while not answers(port, server.ready_path):
            if process.poll() is not None or time.perf_counter() > until:
                what = "ended" if process.poll() is not None else "was not ready in time"
                raise StartError(f"{server.name} {what}:\n{log.read_text()[-2000:]}")
            time.sleep(POLL_S)
        yield port, round(time.perf_counter() - begin, 1)
    finally:
        stop(process)


def answers(port: int, path: str) -> bool:
    """Whether a GET gets 200."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask, then end the whole group, and wait until nobody of it is left."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        deadline = time.perf_counter() + STOP_S
        while time.perf_counter() < deadline:
            os.killpg(process.pid, signal.SIGKILL)  # raises where nobody is left
            process.poll()
            time.sleep(POLL_S)


def model_folder(source: Path, target: Path) -> Path:
    """A folder with the model's config and a tokenizer: `source`, where it has both, else a copy
    in `target` with a made-up one."""
    if any((source / name).exists() for name in TOKENIZER_FILES):
        return source
    folder = target / source.name
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    write_tokenizer(folder, config["vocab_size"], end_id(config))
    return folder


def end_id(config: dict[str, Any]) -> int:
    """The token that ends answers."""
    end = config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    return config["vocab_size"] - 1 if end is None else int(end)


def write_tokenizer(folder: Path, size: int, end: int) -> None:
    """A byte-level tokenizer in which every id from 256 on is a word of its own, so that every
    token is text, and one event of a stream."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}
    vocab |= {f"Ġ{word(number)}": number for number in range(256, size)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ending = f"Ġ{word(end)}" if end >= 256 else letters[end]
    model: dict[str, Any] = {"type": "BPE", "vocab": vocab, "merges": []}
    model |= dict.fromkeys(("dropout", "unk_token"))
    model |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"))
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    del vocab[ending]
    vocab["<|end|>"] = end
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{"id": end, "content": "<|end|>", "special": True, **marks}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    text = json.dumps(content, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def word(number: int) -> str:
    """A distinct word of letters."""
    letters = "w"
    while number:
        number, letter = divmod(number, 26)
        letters += chr(97 + letter)
    return letters
