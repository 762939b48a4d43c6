"""The shipped contract of checkpoint formats holds for ours, and finds what is wrong with one."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.interfaces.weights import TensorInfo, WeightSource
from core.plugin.hookspecs import Registration
from core.testing.checkpoint_format import CASES, Example, check_format
from plugins.checkpoints import register_checkpoint_format
from plugins.checkpoints.safetensors import SafetensorsFormat
from tests.support.gguf_files import write_gguf

REGISTRATIONS = {each.name: each for each in register_checkpoint_format()}


@pytest.fixture(scope="module")
def tensors(tiny_folder: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(tiny_folder("llama") / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.mark.parametrize("case", CASES)
def test_safetensors_keeps_it(case: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    check_format(Example(REGISTRATIONS["safetensors"], folder, tensors), case)


@pytest.mark.parametrize("case", CASES)
def test_gguf_keeps_it(case: str, folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_gguf(folder, tmp_path / "model.gguf")
    check_format(Example(REGISTRATIONS["gguf"], path, tensors), case)


class Source:
    """Right weights, to be made wrong."""

    def __init__(self, right: WeightSource) -> None:
        self._right = right

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._right.tensors()

    def stream(self, name: str, dim: int, *rest: Any) -> Iterator[Tensor]:
        return self._right.stream(name, dim, *rest)


class OtherDtype(Source):
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: replace(info, dtype=torch.bfloat16) for name, info in super().tensors().items()
        }


class ForgetsATensor(Source):
    def tensors(self) -> Mapping[str, TensorInfo]:
        return dict(list(super().tensors().items())[1:])


class ColumnsFromTheLeft(Source):
    def stream(self, name: str, dim: int, start: int, stop: int, *rest: Any) -> Iterator[Tensor]:
        if dim == 1:
            start, stop = 0, stop - start
        return super().stream(name, dim, start, stop, *rest)


class TensorsAsTheyAre(Source):
    """Not as matrices of a row for each entry before the dimension."""

    def stream(self, name: str, dim: int, start: int, stop: int, *rest: Any) -> Iterator[Tensor]:
        for part in super().stream(name, dim, start, stop, *rest):
            yield part.flatten() if dim == 0 else part


class OneBuffer(Source):
    """All rows lie in one place, that of the last tensor too."""

    def stream(self, name: str, dim: int, start: int, stop: int, *rest: Any) -> Iterator[Tensor]:
        for part in super().stream(name, dim, start, stop, *rest):
            yield part * 0


class RecognisesAll(SafetensorsFormat):
    def recognises(self, location: Path) -> bool:
        return True


class RaisesOverFiles(SafetensorsFormat):
    def recognises(self, location: Path) -> bool:
        return any(each.suffix == ".safetensors" for each in location.iterdir())


class NeedsWeights(SafetensorsFormat):
    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        return super().read(location, with_weights=True)


class CountsTwice(SafetensorsFormat):
    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        files = super().read(location, with_weights=with_weights)
        return msgspec.structs.replace(files, num_tensors=2 * files.num_tensors)


class GoesOnWithTheLast(SafetensorsFormat):
    """Damage is not noticed."""

    good: list[ModelFiles] = []  # noqa: RUF012

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        with contextlib.suppress(ModelError):
            self.good.append(super().read(location, with_weights=with_weights))
        return self.good[-1]


class ImportsTorch(SafetensorsFormat):
    def recognises(self, location: Path) -> bool:
        import torch  # noqa: F401

        return super().recognises(location)


def opening(wrong: Callable[[WeightSource], WeightSource]) -> type[SafetensorsFormat]:
    class Format(SafetensorsFormat):
        def open(self, files: ModelFiles, dtype: torch.dtype) -> WeightSource:
            return wrong(super().open(files, dtype))

    return Format


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (opening(OtherDtype), {"headers"}),
        (opening(ForgetsATensor), {"headers"}),
        (opening(ColumnsFromTheLeft), {"slices"}),
        (opening(TensorsAsTheyAre), {"slices", "threads"}),
        (opening(OneBuffer), {"slices", "threads"}),
        (RecognisesAll, {"found"}),
        (RaisesOverFiles, {"found"}),
        (NeedsWeights, {"without_weights"}),
        (CountsTwice, {"read"}),
        (GoesOnWithTheLast, {"damaged"}),
    ],
)
def test_what_is_wrong_is_found(
    made: type[SafetensorsFormat], wrong: set[str], folder: Path, tensors: dict[str, Tensor]
) -> None:
    example = Example(Registration(name="broken", factory=made), folder, tensors)
    found = set()
    for case in set(CASES) - {"no_torch"}:  # which needs a name to import
        try:
            check_format(example, case)
        except Exception:
            found.add(case)
    assert wrong <= found
    assert found <= wrong | {"damaged"}  # where damage is looked for by the same checks


def test_an_import_of_torch_is_found(
    folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    registration = Registration(name="broken", factory=f"{__name__}:ImportsTorch")
    with pytest.raises(AssertionError, match="finding files imports torch"):
        check_format(Example(registration, folder, tensors), "no_torch")
