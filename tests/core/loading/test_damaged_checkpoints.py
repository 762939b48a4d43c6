"""Odd types, sizes and bytes in the files of a checkpoint end with an error that is meant for
users, never with a traceback, a hang or a process that eats all memory.

A few hundred seeded cases in the suite; with NODEWEAVE_FUZZ_SECONDS=300 each test goes on for so
long with other seeds, and loads what it may.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from core.config import ModelConfig
from core.errors import ModelError, NodeweaveError
from core.interfaces.control import ModelFiles
from core.loading.files import resolve_files
from core.loading.generation import IGNORED as GENERATION_IGNORED
from core.loading.generation import NEUTRAL as GENERATION_NEUTRAL
from core.loading.generation import READ as GENERATION_READ
from core.loading.tokenizer_settings import READ as TOKENIZER_READ
from core.parallel.plan import Plan
from core.plugin_manager import PluginManager
from core.resolve import find_family
from core.serve.tokenizer import HfTokenizer
from plugins.models import deepseek, llama, mixtral, qwen3, qwen3_moe
from tests.support.damage import damaged_bytes, damaged_json
from tests.support.engine import app_config
from tests.support.gguf_files import write_gguf
from tests.support.models import build_model, ignore_progress, run_model

Folder = Callable[[str], Path]
SECONDS = float(os.environ.get("NODEWEAVE_FUZZ_SECONDS", "0"))
NUM_CASES = 40  # of each kind of file, where no time is given
MOST_POSITIONS = 1 << 16  # whose rotary angles are computed here
LONGEST_S = 20.0  # of processor time, in one case: what takes long takes minutes
KEYS = {
    "llama": llama.LLAMA_KEYS,
    "mistral": llama.MISTRAL_KEYS,
    "qwen2": qwen3.QWEN2_KEYS,
    "qwen3_moe": qwen3_moe.KEYS,
    "mixtral": mixtral.KEYS,
    "deepseek_v3": deepseek.V3_KEYS,
    "deepseek_v2": deepseek.V2_KEYS,
}
SETTINGS = {
    "generation_config.json": sorted({*GENERATION_READ, *GENERATION_NEUTRAL, *GENERATION_IGNORED}),
    "tokenizer_config.json": sorted(TOKENIZER_READ),
}
PLUGINS = PluginManager.load([])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "cache"))


def seeds(kind: str) -> Iterator[random.Random]:
    """Random numbers for each case; with a time given, those of a run are new."""
    if not SECONDS:
        for number in range(NUM_CASES):
            yield random.Random(f"{kind} {number}")
        return
    start, number = time.time(), 0
    while time.time() < start + SECONDS:
        number += 1
        yield random.Random(f"{kind} {start} {number}")


def serve(path: Path) -> str | None:
    """What the processes of a server do with these files before weights are read; the words of the
    error where there is one."""
    begin = time.process_time()
    try:
        files = resolve_files(ModelConfig(name="m", path=str(path)), ignore_progress)
        line = msgspec.json.encode(files)  # what the other processes are told
        assert msgspec.json.decode(line, type=ModelFiles) == files
        find_family(app_config(ModelConfig(name="m")), PLUGINS, files)
        tokenizer = HfTokenizer.from_folder(files.tokenizer_dir, files.eos_ids)
        tokenizer.decode(tokenizer.encode("Hello <|end|>"))
    except NodeweaveError as error:
        words = str(error)
        words.encode()  # an error that can't be shown is none
        assert len(words) < 4000, words[:300]
        return words
    finally:
        assert time.process_time() - begin < LONGEST_S
    return None


def load(path: Path) -> bool:
    """Whether the weights load and the model computes; the only other end is a ModelError."""
    files = resolve_files(ModelConfig(name="m", path=str(path)), ignore_progress)
    family, spec = find_family(app_config(ModelConfig(name="m")), PLUGINS, files)
    if spec.max_position_embeddings > MOST_POSITIONS or family.plan_problems(spec, Plan()):
        return False
    try:
        logits = run_model(build_model(files), [1, 2, 3])
    except ModelError:
        return False
    assert logits.shape == (3, spec.vocab_size)
    return True


def copied(folder: Path, path: Path) -> Path:
    shutil.copytree(folder, path, copy_function=os.link)
    return path


def rewrite(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # the file may be a link to another's
    path.write_bytes(content)


@pytest.mark.parametrize("name", KEYS)
def test_a_damaged_config_is_refused_or_served(
    name: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(tiny_folder(name), tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    keys = sorted({*KEYS[name].read, *KEYS[name].aliases, "rope_scaling", "quantization_config"})
    served = 0
    for draw in seeds(name):
        raw = damaged_json(draw, content, keys)
        rewrite(folder / "config.json", raw)
        if serve(folder) is None:
            served += 1
            if SECONDS or served % 8 == 0:
                load(folder)
    assert served  # not all damage matters


@pytest.mark.parametrize("file", SETTINGS)
def test_damaged_settings_are_refused_or_served(
    file: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(tiny_folder("llama"), tmp_path / "m")
    content = json.loads((folder / file).read_text())
    for draw in seeds(file):
        rewrite(folder / file, damaged_json(draw, content, SETTINGS[file]))
        serve(folder)


def test_a_damaged_tokenizer_is_refused_or_served(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = copied(tiny_folder("llama"), tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    for draw in seeds("tokenizer"):
        rewrite(folder / "tokenizer.json", damaged_json(draw, content, list(content)))
        serve(folder)


@pytest.mark.parametrize("kind", ["header", "index"])
def test_damaged_weight_files_are_refused_or_loaded(
    kind: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(tiny_folder("llama"), tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:header_end])
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}
    for draw in seeds(kind):
        if kind == "index":
            raw = damaged_json(draw, index, [])
            rewrite(folder / "model.safetensors.index.json", raw)
        elif draw.random() < 0.5:
            rewrite(folder / "model.safetensors", damaged_bytes(draw, whole, 0, header_end))
        else:
            raw = damaged_json(draw, header, ["__metadata__", "dtype", "shape", "data_offsets"])
            prefix = len(raw).to_bytes(8, "little")
            rewrite(folder / "model.safetensors", prefix + raw + whole[header_end:])
        if serve(folder) is None:
            load(folder)


def test_damaged_gguf_files_are_refused_or_served(tiny_folder: Folder, tmp_path: Path) -> None:
    path = write_gguf(tiny_folder("llama"), tmp_path / "m.gguf")
    whole = path.read_bytes()
    end = whole.index(b"token_embd.weight") + 2000
    served = 0
    for draw in seeds("gguf"):
        rewrite(path, damaged_bytes(draw, whole, 0, end))
        if serve(path) is None:
            served += load(path)
    assert served
