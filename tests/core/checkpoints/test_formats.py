"""A format that a package brings is found, read and opened as ours are, and served."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import LLM, SamplingParams
from core.checkpoints.formats import find_format
from core.checkpoints.open import open_weights
from core.errors import ConfigError, ModelError, PluginError
from core.interfaces.control import ModelFiles
from core.interfaces.weights import OpenedWeights, WeightSource
from core.llm.settings import configure
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager, PluginTable
from core.run import main
from core.settings.config import ModelConfig, PluginChoice
from core.sources.files import resolve_files
from core.weights.reader import ShapeReader
from plugins.checkpoints.safetensors import SafetensorsFormat
from tests.support.formats import FILE_PLUGINS
from tests.support.models import CPU, ignore_progress, write_tiny_model
from tests.support.oracle import TransformersOracle
from tests.support.third_party import install_example


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginManager:
    """Where the example's package is installed."""
    install_example("acme_checkpoint", tmp_path / "site", monkeypatch)
    return PluginManager.load()


@pytest.fixture
def with_npy(plugins: PluginManager) -> PluginTable:
    """Its formats, the package's among them."""
    return plugins.table("checkpoint_format")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as transformers writes it."""
    return write_tiny_model(tmp_path / "written", "llama")


def as_npy(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The same model in the example's format, and its weights."""
    npy = folder.parent / "npy"
    shutil.copytree(folder, npy, ignore=shutil.ignore_patterns("*.safetensors*"))
    (npy / "weights").mkdir()
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for name, tensor in tensors.items():
        np.save(npy / "weights" / f"{name}.npy", tensor.float().numpy())
    return npy, tensors


def test_a_format_from_elsewhere_is_loaded(folder: Path, plugins: PluginManager) -> None:
    npy, tensors = as_npy(folder)
    model = ModelConfig(name="m", path=str(npy))
    files = resolve_files(model, plugins, ignore_progress)
    assert (files.weight_format, files.num_tensors) == ("npy", len(tensors))
    reader = open_weights(
        model,
        files,
        plugins.table("checkpoint_format"),
        dtype=torch.float32,
        device=CPU,
        on_progress=ignore_progress,
    )
    for name, expected in tensors.items():
        assert torch.equal(reader.take(name, tuple(expected.shape)), expected.float()), name
    reader.finish()


@pytest.mark.slow
def test_a_format_from_elsewhere_is_served(
    folder: Path, plugins: PluginManager, capsys: pytest.CaptureFixture[str]
) -> None:
    """By processes of their own, which find the package as they find ours."""
    npy, _ = as_npy(folder)
    engine = {"device": "cpu", "page_size": 4, "kv_cache_tokens": 512}
    settings: dict[str, Any] = {"model.dtype": "float32", "model.max_model_len": 64}
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(npy, parallel="tp2", engine=engine, **settings) as llm:
        [answer] = llm.generate([[3, 1, 4, 1, 5]], greedy)
    TransformersOracle(folder).check_greedy(answer.prompt_token_ids, answer.token_ids)
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "acme_checkpoint (acme_checkpoint 1.0, module acme_checkpoint)" in listed
    assert "  checkpoint_format: npy - a Hugging Face folder whose" in listed
    assert "  checkpoint_format: safetensors - " in listed


def test_several_formats_in_one_folder_are_named(folder: Path, with_npy: PluginTable) -> None:
    npy, _ = as_npy(folder)
    (npy / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"several formats: safetensors, npy; .*model\.load_format"
    ):
        find_format(npy, PluginChoice(name="auto"), with_npy)
    assert find_format(npy, PluginChoice(name="npy"), with_npy)[0] == "npy"
    assert find_format(npy, PluginChoice(name="safetensors"), with_npy)[0] == "safetensors"


def test_what_no_format_takes_names_what_all_need(tmp_path: Path, with_npy: PluginTable) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"a folder, or a \.gguf file, or a folder with weights/"):
        find_format(tmp_path / "notes.txt", PluginChoice(name="auto"), with_npy)


def test_a_format_that_the_files_are_not_in_is_refused(
    folder: Path, plugins: PluginManager
) -> None:
    model = ModelConfig(name="m", path=str(folder), load_format="npy")
    with pytest.raises(
        ConfigError, match="holds safetensors weights; allowed: auto, safetensors, dummy"
    ):
        resolve_files(model, plugins, ignore_progress)


def test_an_unknown_format_is_answered_with_those_there_are(with_npy: PluginTable) -> None:
    with pytest.raises(PluginError) as caught:
        configure("smollm2", {"model.load_format": "safetensor"})
    assert str(caught.value) == (
        "model.load_format=safetensor: there is no checkpoint_format plugin 'safetensor'; "
        "did you mean 'safetensors'?\n"
        "checkpoint_format plugins: dummy, gguf, npy, safetensors"
    )


def test_a_format_that_does_not_import_names_its_package() -> None:
    class Broken:
        @hookimpl
        def register_checkpoint_format(self) -> list[Registration]:
            return [Registration(name="broken", factory="nowhere.at_all:Format")]

    plugins = PluginManager.load(builtins=BUILTINS, objects={"acme": Broken()})
    table = plugins.table("checkpoint_format")
    with pytest.raises(PluginError, match=r"'broken' \(from acme\) can't be used here: nowhere"):
        find_format(Path("/"), PluginChoice(name="auto"), table)
    assert (
        find_format(Path("x.gguf"), PluginChoice(name="gguf"), table)[0] == "gguf"
    )  # the others are not asked


BUILTINS = ["plugins.checkpoints", "plugins.tokenizers"]


class Ones:
    """Makes weights up, as `dummy` does: here they are as empty as the shapes'."""

    def generate(self, model: ModelConfig, **_: Any) -> OpenedWeights:
        return ShapeReader(torch.float32)


def test_weights_may_be_made_up_by_a_plugin(folder: Path) -> None:
    class Plugin:
        @hookimpl
        def register_checkpoint_format(self) -> list[Registration]:
            return [Registration(name="ones", factory=lambda options: Ones())]

    plugins = PluginManager.load(builtins=BUILTINS, objects={"acme": Plugin()})
    table = plugins.table("checkpoint_format")
    (folder / "model.safetensors").write_bytes(b"damaged, and not looked at")
    for model in (
        ModelConfig(name="m", path=str(folder), load_format="ones"),
        ModelConfig(name="m", shape={"vocab_size": 300} | ARCHITECTURE, load_format="ones"),
    ):
        files = resolve_files(model, plugins, ignore_progress)
        assert (files.weight_format, files.weight_files) == ("ones", [])
        reader = open_weights(
            model, files, table, dtype=torch.float32, device=CPU, on_progress=ignore_progress
        )
        assert isinstance(reader, ShapeReader)


@dataclass(slots=True, kw_only=True)
class MirrorOptions:
    suffix: str = "safetensors"


class Mirror(SafetensorsFormat):
    """Weights by another name, which an option tells."""

    def __init__(self, options: MirrorOptions) -> None:
        self._pattern = f"*.{options.suffix}"

    def recognises(self, location: Path) -> bool:
        return any(location.glob(self._pattern))

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        [path] = location.glob(self._pattern)
        files = super().read(location, with_weights=False)
        return msgspec.structs.replace(files, weight_files=[str(path)])

    def open(self, files: ModelFiles, dtype: torch.dtype) -> WeightSource:
        assert files.weight_files[0].endswith(self._pattern[1:])
        return super().open(files, dtype)


class WithMirror:
    @hookimpl
    def register_checkpoint_format(self) -> list[Registration]:
        return [Registration(name="mirror", factory=Mirror, config=MirrorOptions)]


def test_options_reach_who_reads_and_who_opens(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.copy")
    plugins = PluginManager.load(builtins=BUILTINS, objects={"acme": WithMirror()})
    options = {"suffix": "copy"}
    model = ModelConfig(name="m", path=str(folder), load_format="mirror", load_options=options)
    files = resolve_files(model, plugins, ignore_progress)
    assert files.weight_files == [str(folder / "model.copy")]
    table = plugins.table("checkpoint_format")
    reader = open_weights(
        model, files, table, dtype=torch.float32, device=CPU, on_progress=ignore_progress
    )
    assert reader.has("model.norm.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.load_format": "mirror", "model.load_options.sufix": "x"},
            r"unknown key 'model\.load_options\.sufix'; did you mean 'suffix'",
        ),
        (
            {"model.load_options.suffix": "x"},
            r"model\.load_options are given but model\.load_format\S* is auto; .*: dummy, gguf",
        ),
    ],
)
def test_options_that_no_format_takes(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = PluginManager.load(objects={"acme": WithMirror()})
    monkeypatch.setattr(PluginManager, "load", lambda *_: plugins)
    with pytest.raises(ConfigError, match=message):
        configure("smollm2", settings)


ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("wanted", "patterns"),
    [
        ("auto", ["*.safetensors", "weights/*.npy"]),
        ("safetensors", ["*.safetensors"]),
        ("npy", ["weights/*.npy"]),
        ("dummy", []),
    ],
)
def test_the_hub_is_asked_for_the_files_of_the_format(
    folder: Path,
    plugins: PluginManager,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    patterns: Any,
) -> None:
    place = as_npy(folder)[0] if wanted == "npy" else folder
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = ModelConfig(name="m", path="owner/name", load_format=wanted)
    resolve_files(model, plugins, ignore_progress)
    assert asked == [["*.json", "*.jinja", "tokenizer.model", *patterns]]


def test_a_format_that_takes_nothing_from_the_hub_says_so() -> None:
    model = ModelConfig(name="m", path="owner/name", load_format="gguf")
    with pytest.raises(ModelError, match=r"takes no files of a repository .*needed: a \.gguf file"):
        resolve_files(model, FILE_PLUGINS, ignore_progress)


def test_a_folder_named_like_a_gguf_file_is_told_to_be_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"it is a folder; needed: a regular file"):
        resolve_files(ModelConfig(name="m", path=str(folder)), FILE_PLUGINS, ignore_progress)


def test_finding_a_format_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core.checkpoints.formats import find_format\n"
        "from tests.support.formats import FORMATS, FILE_PLUGINS\n"
        "from core.settings.config import PluginChoice\n"
        "find_format(Path(sys.argv[1]), PluginChoice(), FORMATS)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
