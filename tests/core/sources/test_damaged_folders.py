"""Damaged folders of a model: the file is named with what is wrong in it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from tests.support.model_folders import edit_json, resolve, shard_weights
from tests.support.models import build_model, edit_config

Damage = Callable[[Path], object]
DAMAGE: dict[str, tuple[Damage, list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["is not a JSON object"]),
    "config is empty": (
        lambda f: (f / "config.json").write_text("  "),
        ["config.json is not a JSON object: it is empty; repair it, or fetch it again"],
    ),
    "config with NaN": (
        lambda f: (f / "config.json").write_text('{\n "a": 1,\n "b": [NaN]}'),
        ["config.json is not a JSON object: NaN (line 3) is no JSON; allowed: null"],
    ),
    "config with an infinite number": (
        lambda f: (f / "config.json").write_text('{"a": -Infinity}'),
        ["Infinity (line 1) is no JSON"],
    ),
    "config with a byte order mark": (
        lambda f: (f / "config.json").write_text("{}", encoding="utf-8-sig"),
        ["byte order mark"],
    ),
    "config in UTF-16": (
        lambda f: (f / "config.json").write_text("{}", encoding="utf-16"),
        ["it is UTF-16"],
    ),
    "config is a pointer": (
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1"),
        ["config.json is not a JSON object: it is a pointer of Git LFS"],
    ),
    "config is a web page": (
        lambda f: (f / "config.json").write_text("<!doctype html>"),
        ["it looks like a web page"],
    ),
    "config with a comma too many": (
        lambda f: (f / "config.json").write_text('{\n "a": 1,\n}'),
        ["(line 3); repair it, or fetch it again"],
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ["is not a JSON object"]),
    "no architecture": (lambda f: edit_config(f, architectures=None), ["architectures=None"]),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["no *.safetensors", "pytorch_model.bin is a pickle"],
    ),
    "weights cut off": (
        lambda f: os.truncate(f / "model.safetensors", 100_000),
        ["model.safetensors is cut off", "fetch the file again"],
    ),
    "weights are noise": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x05\x00" * 50),
        ["model.safetensors", "not a whole safetensors file"],
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ["missing tokenizer", "tokenizer.json"],
    ),
    "only tokenizer.model": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        ["tokenizer.model but no tokenizer.json", "save_pretrained"],
    ),
    "index without its file": (
        lambda f: (shard_weights(f), (f / "model-1.safetensors").unlink()),
        ["model-1.safetensors is missing", "model.safetensors.index.json"],
    ),
    "index points outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../x.safetensors"}})
        ),
        ["weight_map"],
    ),
    "index with a wrong tensor": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors"}})
        ),
        ["tensor a is not in"],
    ),
    "eos is no id": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        ["eos_token_id='x'"],
    ),
    "eos is beyond all ids": (
        lambda f: edit_config(f, eos_token_id=1 << 40) or (f / "generation_config.json").unlink(),
        ["config.json", "eos_token_id=1099511627776"],
    ),
    "a temperature in words": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": "hot"}'),
        ["generation_config.json", "temperature='hot'", "from 0 to 100"],
    ),
    "a huge top_k": (
        lambda f: (f / "generation_config.json").write_text(f'{{"top_k": {2**70}}}'),
        ["top_k=1180591620717411303424", "up to 2147483647"],
    ),
    "a penalty of nothing": (
        lambda f: (f / "generation_config.json").write_text('{"repetition_penalty": 0}'),
        ["repetition_penalty=0", "above 0"],
    ),
    "deep config": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        ["config.json is not a JSON object", "nested"],
    ),
    "deep enough to be read": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 100 + "]" * 100 + "}"),
        ["config.json: a is nested deeper than 64"],
    ),
    "a number of 65 bits": (
        lambda f: edit_config(f, x=[{"y": 1 << 64}]),
        ["config.json: x holds a number of more than 64 bits"],
    ),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ["config.json: it is a folder"],
    ),
    "config is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        ["config.json: it is a pipe"],
    ),
    "weights are a pipe": (
        lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
        ["model.safetensors: it is a pipe"],
    ),
    "weights are a device": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors").symlink_to("/dev/zero"),
        ),
        ["model.safetensors: it is a device"],
    ),
    "tokenizer is a pipe": (
        lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")),
        ["tokenizer.json: it is a pipe"],
    ),
    "a token far beyond": (
        lambda f: edit_json(
            f / "tokenizer.json", added_tokens=[{"id": (1 << 32) - 1, "content": "<|x|>"}]
        ),
        ["tokenizer.json", "'<|x|>'", "4294967295", "4194303"],
    ),
    "a vocabulary of words": (
        lambda f: edit_json(f / "tokenizer.json", model={"vocab": {"a": "b"}}),
        ["tokenizer.json is not a JSON object"],
    ),
    "a deep tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model":' + "[" * 100_000),
        ["tokenizer.json is not a JSON object"],
    ),
    "flags in words": (
        lambda f: edit_json(f / "tokenizer_config.json", add_bos_token="yes"),
        ["tokenizer_config.json: add_bos_token='yes'", "true or false"],
    ),
    "a template that is none": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=[{"name": "x"}]),
        ["tokenizer_config.json: chat_template=", "name and template"],
    ),
    "an eos token that is none": (
        lambda f: edit_json(f / "tokenizer_config.json", eos_token=["x"]),
        ["tokenizer_config.json: eos_token=", "a text"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named_with_what_is_wrong(folder: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(ModelError) as error:
        resolve(folder)
    assert str(folder) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def drop(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    save_file(kept, folder / "model.safetensors")


def add(folder: Path, **added: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | added, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: drop(f, "model.layers.1.mlp.up_proj.weight"),
            ["model.layers.1.mlp.up_proj.weight of shape 192x96 is missing"],
        ),
        (lambda f: add(f, extra=torch.zeros(2)), ["1 tensor of the checkpoint", "extra"]),
        (lambda f: edit_config(f, num_hidden_layers=2), ["model.layers.2."]),
        (lambda f: edit_config(f, hidden_size=48), ["263x96", "needs 263x48"]),
        (
            lambda f: edit_config(f, attention_bias=True),
            ["12 tensors are missing", "q_proj.bias of shape 192"],
        ),
    ],
)
def test_weights_that_are_not_the_configs_are_named(
    folder: Path, change: Damage, words: list[str]
) -> None:
    change(folder)
    with pytest.raises(ModelError) as error:
        build_model(resolve(folder))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "model.safetensors" in str(error.value)
