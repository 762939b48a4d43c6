"""Odd types, sizes and bytes in the files of a checkpoint end with an error that is meant for
users, never with a traceback, a hang or a process that eats all memory.

A few hundred seeded cases in the suite; with NODEWEAVE_FUZZ_SECONDS=300 each test goes on for so
long with other seeds, and loads what it may.
"""

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from core.errors import ModelError, NodeweaveError, RequestError
from core.interfaces.control import ModelFiles
from core.model_files.generation import IGNORED as GENERATION_IGNORED
from core.model_files.generation import NEUTRAL as GENERATION_NEUTRAL
from core.model_files.generation import READ as GENERATION_READ
from core.model_files.tokenizer_settings import READ as TOKENIZER_READ
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.resolve import find_family
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from plugins.models import deepseek, glm4_moe, llama, mixtral, qwen3, qwen3_moe
from plugins.tokenizers._hf.panics import LibraryError
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support import small_tokenizer
from tests.support.damage import damaged_bytes, damaged_json, damaged_template
from tests.support.engine import app_config
from tests.support.formats import FILE_PLUGINS
from tests.support.gguf_files import write_gguf
from tests.support.models import build_model, ignore_progress, run_model
from tests.support.template_manners import MANNERS

Folder = Callable[[str], Path]
SECONDS = float(os.environ.get("NODEWEAVE_FUZZ_SECONDS", "0"))
NUM_CASES = 40  # of each kind of file, where no time is given
MOST_POSITIONS = 1 << 16  # whose rotary angles are computed here
MOST_MIB = 1024  # by which one case may raise the most that this process has held
FILES = re.compile(r"config\.json|tokenizer|safetensors|\.gguf|chat template")
LONGEST_S = 20.0  # of processor time, in one case: what takes long takes minutes
KEYS = {
    "llama": llama.LLAMA_KEYS,
    "mistral": llama.MISTRAL_KEYS,
    "qwen2": qwen3.QWEN2_KEYS,
    "qwen3_moe": qwen3_moe.KEYS,
    "mixtral": mixtral.KEYS,
    "deepseek_v3": deepseek.V3_KEYS,
    "deepseek_v2": deepseek.V2_KEYS,
    "glm4_moe": glm4_moe.KEYS,
}
SETTINGS = {
    "generation_config.json": sorted({*GENERATION_READ, *GENERATION_NEUTRAL, *GENERATION_IGNORED}),
    "tokenizer_config.json": sorted(TOKENIZER_READ),
}
TOKENIZER_PARTS = (
    "type", "pattern", "Regex", "String", "behavior", "decoders", "normalizers", "pretokenizers",
    "processors", "special_tokens", "single", "pair", "precompiled_charsmap", "replacement",
    "prepend_scheme", "cls", "sep", "trim_offsets", "add_prefix_space", "unk_id", "scores",
)  # fmt: skip
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
    begin, held_mib = time.process_time(), most_held_mib()
    try:
        files = resolve_files(ModelConfig(name="m", path=str(path)), FILE_PLUGINS, ignore_progress)
        line = msgspec.json.encode(files)  # what the other processes are told
        assert msgspec.json.decode(line, type=ModelFiles) == files
        find_family(app_config(ModelConfig(name="m")), PLUGINS, files)
        tokenizer = HfTokenizer.from_folder(files.tokenizer_dir, files.eos_ids)
        use(tokenizer)
    except NodeweaveError as error:
        words = str(error)
        words.encode()  # an error that can't be shown is none
        assert len(words) < 4000, words[:300]
        assert FILES.search(words), words
        return words
    finally:
        assert time.process_time() - begin < LONGEST_S
        assert most_held_mib() - held_mib < MOST_MIB
    return None


def render(folder: Path) -> str | None:
    """What the text service does with a template; the words of the error where there is one."""
    try:
        tokenizer = HfTokenizer.from_folder(folder, [])
        tokenizer.compile_templates()
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    except (ModelError, RequestError) as error:
        return str(error)
    return None


def most_held_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def serve_apart(path: Path) -> None:
    """`serve` in a child: the tokenizers library may abort the process that builds with it, which
    costs the text process and not the server (core.serve.text.pool)."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            serve(path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT:
        return
    assert status == 0


@contextmanager
def one_request() -> Iterator[None]:
    """Let pass what the library raises; not what a fault of ours would."""
    try:
        yield
    except LibraryError:
        pass
    except Exception as error:
        if type(error) is not Exception:
            raise


def use(tokenizer: HfTokenizer) -> None:
    """What the frontend does with a tokenizer."""
    with one_request():
        ids = tokenizer.encode("Hello <|end|> h\u00e9")
        tokenizer.decode(ids)
    answers: list[tuple[list[int], list[int]]] = [
        ([], [*range(300)]),
        ([1, 2], [5, 300, 1 << 20, 3]),
        ([250], [250] * 9),
    ]
    for prompt, answer in answers:
        for skip in (True, False):
            with one_request():
                detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt_ids=prompt)
                for token_id in answer:
                    detokenizer.add([token_id])
                detokenizer.finish()
    for token_id in (0, 1, 200, 300, 1 << 20):
        with one_request():
            tokenizer.token_text(token_id)


def load(path: Path) -> bool:
    """Whether the weights load and the model computes; the only other end is a ModelError."""
    files = resolve_files(ModelConfig(name="m", path=str(path)), FILE_PLUGINS, ignore_progress)
    family, spec = find_family(app_config(ModelConfig(name="m")), PLUGINS, files)
    if spec.max_position_embeddings > MOST_POSITIONS or family.plan_problems(spec, Plan()):
        return False
    try:
        ids = [1, 2, 3][: spec.max_position_embeddings]
        logits = run_model(build_model(files), ids)
    except ModelError:
        return False
    assert logits.shape == (len(ids), spec.vocab_size)
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
    shared = ("rope_scaling", "partial_rotary_factor", "quantization_config")
    keys = sorted({*KEYS[name].read, *KEYS[name].aliases, *shared})
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


@pytest.mark.parametrize("kind", ["bytes", *small_tokenizer.KINDS])
def test_a_damaged_tokenizer_is_refused_or_served(
    kind: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(tiny_folder("llama"), tmp_path / "m")
    if kind in small_tokenizer.KINDS:
        rewrite(folder / "tokenizer.json", small_tokenizer.KINDS[kind]().to_str().encode())
    content = json.loads((folder / "tokenizer.json").read_text())
    keys = [*content, *content["model"], *TOKENIZER_PARTS]
    for draw in seeds(f"tokenizer {kind}"):
        rewrite(folder / "tokenizer.json", damaged_json(draw, content, keys))
        serve_apart(folder) if SECONDS else serve(folder)


def test_a_damaged_chat_template_is_refused_or_rendered(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(tiny_folder("llama"), tmp_path / "m")
    sources, rendered = sorted(MANNERS), 0
    for draw in seeds("template"):
        source = damaged_template(draw, MANNERS[draw.choice(sources)])
        rewrite(folder / "chat_template.jinja", source.encode())
        begin, held_mib = time.process_time(), most_held_mib()
        words = render(folder)
        rendered += words is None
        assert words is None or ("chat template" in words and len(words) < 4000), words[:300]
        assert time.process_time() - begin < LONGEST_S
        assert most_held_mib() - held_mib < MOST_MIB
    assert rendered


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
