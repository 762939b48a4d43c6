"""Finding a model's files: what each kind of source gives, and the error for each thing missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from core.errors import ConfigError, ModelError, ResourceError
from core.settings.config import PackageSource
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.gguf_files import write_gguf
from tests.support.model_folders import SHAPE, Folder, edit_json, resolve, shard_weights
from tests.support.models import build_model, edit_config, run_model
from tests.support.oracle import TransformersOracle


def test_a_folder_gives_its_own_files(folder: Path) -> None:
    files = resolve(folder)
    assert files.weight_format == "safetensors"
    assert files.weight_files == [str(folder / "model.safetensors")]
    assert files.tokenizer_dir == str(folder)
    assert files.hf_config["hidden_size"] == 96
    assert files.eos_ids == [256]


def test_sharded_folders_give_the_same_model(folder: Path) -> None:
    expected = run_model(build_model(resolve(folder)), [1, 2, 3])
    shard_weights(folder)
    save_file({"unrelated": torch.zeros(1)}, folder / "consolidated.safetensors")
    files = resolve(folder)
    assert [Path(path).name for path in files.weight_files] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    assert torch.equal(run_model(build_model(files), [1, 2, 3]), expected)


def test_one_set_of_tokens_ends_an_answer(folder: Path) -> None:
    """What generation_config.json names, else config.json, and the tokenizer's own (256)."""
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [7, 9, 7]}')
    assert resolve(folder).eos_ids == [7, 9, 256]
    path.unlink()
    edit_config(folder, eos_token_id=12)
    assert resolve(folder).eos_ids == [12, 256]
    edit_config(folder, eos_token_id=None)
    assert resolve(folder).eos_ids == [256]
    settings = folder / "tokenizer_config.json"
    settings.write_text('{"eos_token": {"content": "<|end|>"}}')
    assert resolve(folder).eos_ids == [256]
    settings.unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    assert resolve(folder).eos_ids == [256]
    assert resolve(folder).warnings == []


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_token_that_ends_turns_in_the_template_ends_an_answer(folder: Path, file: str) -> None:
    """A fine-tuned model whose files name the end of text alone."""
    added = [{"id": 257, "content": "<|im_end|>"}, {"id": 258, "content": "<|eot_id|>"}]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    edit_json(folder / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], *added])
    assert resolve(folder).eos_ids == [256]
    template = "{{ messages[0].content }}<|im_end|>"
    if file == "tokenizer_config.json":
        edit_json(folder / file, chat_template=template)
    else:
        (folder / file).write_text(template)
    assert resolve(folder).eos_ids == [256, 257]


def test_numbers_of_any_size_are_read_where_nothing_computes_with_them(folder: Path) -> None:
    """transformers writes a model_max_length of 10**30 where there is none."""
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert resolve(folder).warnings == []
    HfTokenizer.from_folder(folder)


def test_a_model_without_an_end_is_warned_of(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|other|>"}')
    edit_config(folder, eos_token_id=None)
    files = resolve(folder)
    assert files.eos_ids == []
    assert any("'<|other|>' is no token" in warning for warning in files.warnings)
    assert any("no token is known to end an answer" in warning for warning in files.warnings)


def test_sampling_defaults_are_the_checkpoints(folder: Path) -> None:
    generation = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.2}
    generation["repetition_penalty"] = 1.5
    path = folder / "generation_config.json"
    path.write_text(json.dumps(generation | {"do_sample": True, "max_length": 5}))
    files = resolve(folder)
    assert files.default_sampling == generation
    assert files.warnings == []
    # Greedy: nothing is drawn, but repetitions are still penalised.
    path.write_text(json.dumps(generation | {"do_sample": False}))
    assert resolve(folder).default_sampling == {"repetition_penalty": 1.5}
    path.write_text(json.dumps({"top_k": -1, "temperature": None, "typical_p": 0.9, "novel": 3}))
    files = resolve(folder)
    assert files.default_sampling == {"top_k": 0}
    (warning,) = files.warnings
    assert "typical_p=0.9" in warning
    assert "novel" in warning


def store_head(folder: Path, head: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if head is None else head
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def test_a_stored_head_that_differs_is_served(folder: Path, tiny_folder: Folder) -> None:
    edit_config(folder, tie_word_embeddings=True)
    store_head(folder, None)
    tied = resolve(folder)
    assert tied.hf_config["tie_word_embeddings"] is True
    assert tied.warnings == []
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    head[-1, -1] += 1  # the last number of all
    store_head(folder, head)
    files = resolve(folder)
    assert files.hf_config["tie_word_embeddings"] is False
    (warning,) = files.warnings
    assert "tie_word_embeddings=true" in warning
    oracle = TransformersOracle(folder)
    found = run_model(build_model(files), [1, 2, 3])
    torch.testing.assert_close(found, oracle.logits([1, 2, 3]), atol=1e-4, rtol=1e-4)
    assert found[-1, -1] != run_model(build_model(tied), [1, 2, 3])[-1, -1]
    store_head(folder, head.bfloat16())
    assert resolve(folder).hf_config["tie_word_embeddings"] is False


def test_dtype_is_that_of_the_weights_where_the_config_is_silent(folder: Path) -> None:
    edit_config(folder, dtype=None, torch_dtype=None)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    assert resolve(folder).hf_config["dtype"] == "bfloat16"


def test_a_gguf_file_gives_config_and_tokenizer(
    own_cache: Path, tiny_folder: Folder, tmp_path: Path
) -> None:
    path = write_gguf(tiny_folder("qwen3"), tmp_path / "model.gguf")
    files = resolve(path)
    assert (files.weight_format, files.weight_files) == ("gguf", [str(path)])
    assert files.hf_config["architectures"] == ["Qwen3ForCausalLM"]
    assert files.eos_ids == [256]
    assert Path(files.tokenizer_dir).is_relative_to(own_cache)


def test_dummy_needs_no_files_where_the_shape_is_known(own_cache: Path) -> None:
    files = resolve("owner/name", shape=SHAPE, load_format="dummy")
    assert (files.weight_format, files.weight_files) == ("dummy", [])
    assert files.hf_config == SHAPE
    tokenizer = Tokenizer.from_file(f"{files.tokenizer_dir}/tokenizer.json")
    text = "Grüße, 中文 \U0001f600\n"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert files.eos_ids == [256] == tokenizer.encode("<|end|>").ids
    logits = run_model(build_model(files), [1, 2, 3])
    assert logits.std() > 0
    assert torch.equal(run_model(build_model(files), [1, 2, 3]), logits)


def test_dummy_takes_config_and_tokenizer_from_local_files(
    own_cache: Path, folder: Path, tiny_folder: Folder, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    files = resolve(folder, load_format="dummy")
    assert (files.weight_format, files.tokenizer_dir) == ("dummy", str(folder))
    (folder / "tokenizer.json").unlink()
    assert Path(resolve(folder, load_format="dummy").tokenizer_dir).is_relative_to(own_cache)
    gguf = write_gguf(tiny_folder("llama"), tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    assert resolve(gguf).group_bits["lm_head.weight"] == 8
    files = resolve(gguf, load_format="dummy")
    assert (files.weight_format, files.weight_files) == ("dummy", [])
    assert files.group_bits == {}  # made-up matrices are plain


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({}, ModelError, ["'tiny' has no files", "model.path"]),
        ({"shape": SHAPE}, ModelError, ["model.load_format=dummy"]),
        ({"path": "/absent/folder"}, ModelError, ["'/absent/folder' does not exist", "Hub id"]),
        ({"path": "./absent"}, ModelError, ["does not exist"]),
        (
            {"path": "a/b", "package": PackageSource(name="p", version="1", member="m", sha256="")},
            ConfigError,
            ["model.path='a/b'", "model.package='p'", "both set"],
        ),
        (
            {"shape": SHAPE | {"vocab_size": 200}, "load_format": "dummy"},
            ModelError,
            ["vocab_size=200", "257"],
        ),
        (
            {"shape": {"hidden_size": 3}, "load_format": "dummy"},
            ConfigError,
            ["model.shape.vocab_size=None"],
        ),
    ],
)
def test_configurations_without_files(
    own_cache: Path, fields: dict[str, Any], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as error:
        resolve(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_load_format_must_be_that_of_the_files(folder: Path) -> None:
    assert resolve(folder, load_format="safetensors").weight_format == "safetensors"
    with pytest.raises(ConfigError, match=r"load_format='gguf', but .*safetensors"):
        resolve(folder, load_format="gguf")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"x\.bin is no model"):
        resolve(tmp_path / "x.bin")
    (tmp_path / "x.gguf").write_bytes(b"GGUFxxxx")
    with pytest.raises(ModelError, match=r"x\.gguf is not a GGUF file"):
        resolve(tmp_path / "x.gguf")


@pytest.mark.parametrize("path", ["nobody/nothing", "org/Name-1.5B"])
def test_hub_ids_without_a_hub(monkeypatch: pytest.MonkeyPatch, path: str, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        resolve(path)
    for words in (path, "Hub can't be reached", "local folder"):
        assert words in str(error.value)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="NODEWEAVE_CACHE"):
        resolve(shape=SHAPE, load_format="dummy")


def test_the_launcher_needs_no_torch(own_cache: Path, tiny_folder: Folder, tmp_path: Path) -> None:
    """Finding files, of every kind, imports neither torch nor transformers."""
    gguf = write_gguf(tiny_folder("llama"), tmp_path / "model.gguf")
    script = """
import sys
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from tests.support.formats import FILE_PLUGINS
for path in sys.argv[1:]:
    resolve_files(ModelConfig(name="m", path=path), FILE_PLUGINS, lambda *_: None)
shape = {"architectures": ["X"], "vocab_size": 300}
model = ModelConfig(name="m", shape=shape, load_format="dummy")
resolve_files(model, FILE_PLUGINS, lambda *_: None)
loaded = sorted({"torch", "transformers", "tokenizers"} & sys.modules.keys())
assert not loaded, loaded
"""
    command = [sys.executable, "-c", script, str(tiny_folder("llama")), str(gguf)]
    subprocess.run(command, check=True, timeout=60)
