"""A format of checkpoints that core doesn't know is found, read and opened through its Protocol."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.checkpoints.formats import FORMATS, find_format
from core.checkpoints.open import open_weights
from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.interfaces.weights import GroupedInts, TensorInfo
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from plugins.checkpoints.safetensors import SafetensorsFormat
from tests.support.models import CPU, ignore_progress, write_tiny_model

TOY = FORMATS | {"toy": f"{__name__}:ToyFormat"}


class ToySource:
    """All tensors in one JSON file: {name: nested lists}."""

    def __init__(self, path: str) -> None:
        stored = json.loads(Path(path).read_text())
        self._values = {name: torch.tensor(values) for name, values in stored.items()}
        self._path = path

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(t.shape), t.dtype, self._path)
            for name, t in self._values.items()
        }

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        part = self._values[name].narrow(dim, start, stop - start)
        num_rows = math.prod(part.shape[: max(dim, 1)])
        yield part.reshape(num_rows, -1)

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> GroupedInts:
        raise AssertionError(name)


class ToyFormat:
    needs = "a folder with weights.toy"

    def recognises(self, location: Path) -> bool:
        return (location / "weights.toy").exists()

    def stands_in(self, location: Path) -> bool:
        return False

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        found = SafetensorsFormat().read(location, with_weights=False)
        return msgspec.structs.replace(found, weight_files=[str(location / "weights.toy")])

    def open(self, files: ModelFiles, dtype: torch.dtype) -> ToySource:
        return ToySource(files.weight_files[0])


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny model whose weights lie in the toy's file only, and those weights."""
    folder = write_tiny_model(tmp_path, "llama")
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    values = {name: t.float().tolist() for name, t in tensors.items()}
    (folder / "weights.toy").write_text(json.dumps(values))
    return folder, tensors


def test_a_format_from_elsewhere_is_loaded(toy: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = toy
    model = ModelConfig(name="m", path=str(folder))
    files = resolve_files(model, ignore_progress, TOY)
    assert files.weight_format == "toy"
    reader = open_weights(
        model,
        files,
        dtype=torch.float32,
        device=CPU,
        on_progress=ignore_progress,
        formats=TOY,
    )
    for name, expected in tensors.items():
        assert torch.equal(reader.take(name, tuple(expected.shape)), expected.float()), name
    reader.finish()


def test_several_formats_in_one_folder_are_named(toy: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = toy
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"several formats: safetensors, toy; .*model\.load_format"
    ):
        find_format(folder, "auto", TOY)
    assert find_format(folder, "toy", TOY)[0] == "toy"
    assert find_format(folder, "safetensors", TOY)[0] == "safetensors"


def test_what_no_format_takes_names_what_all_need(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"a folder, or a \.gguf file, or a folder with weights\."):
        find_format(tmp_path / "notes.txt", "auto", TOY)


def test_a_folder_named_like_a_gguf_file_is_told_to_be_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"it is a folder; needed: a regular file"):
        resolve_files(ModelConfig(name="m", path=str(folder)), ignore_progress)


def test_finding_a_format_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core.checkpoints.formats import find_format\n"
        "find_format(Path(sys.argv[1])); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
