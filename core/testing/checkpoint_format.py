"""The contract of checkpoint formats: a folder is found, and every slice of its weights is right.

    from core.testing.checkpoint_format import CASES, Example, check_format

    @pytest.fixture(scope="module")
    def example(tmp_path_factory):
        folder = ...  # config.json, tokenizer.json, and `tensors` in the format's own files
        return Example(acme_checkpoint.register_checkpoint_format()[0], folder, tensors)

    @pytest.mark.parametrize("case", CASES)
    def test_contract(example, case):
        check_format(example, case)

`tensors` should hold vectors, matrices and a tensor of three dimensions or more, in the dtypes that
the format stores without loss.
"""

import importlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ModelError
from core.interfaces.checkpoint import CheckpointFormat
from core.interfaces.control import ModelFiles
from core.interfaces.weights import WeightSource
from core.plugin.hookspecs import Registration

STAGING_BYTES = (1, 1 << 20)  # a row hardly fits; everything does


@dataclass(frozen=True, slots=True)
class Example:
    """A checkpoint in the format, and what it holds."""

    registration: Registration
    location: Path  # a folder, or a file
    tensors: Mapping[str, Tensor]  # by their Hugging Face names, in the dtypes they are read as
    dtype: torch.dtype = field(default=torch.float32)  # the model's

    def format(self) -> CheckpointFormat:
        factory = self.registration.factory
        if isinstance(factory, str):
            module, _, name = factory.partition(":")
            factory = getattr(importlib.import_module(module), name)
        made: CheckpointFormat = factory(self.registration.config())
        return made

    def read(self) -> ModelFiles:
        return self.format().read(self.location, with_weights=True)

    def open(self) -> WeightSource:
        return self.format().open(self.read(), self.dtype)


def check_format(example: Example, case: str) -> None:
    """One of CASES. Raises AssertionError, or what the plugin does."""
    _CHECKS[case](example)


def _found(example: Example) -> None:
    """It recognises its own and nothing else, and never raises."""
    made = example.format()
    assert made.recognises(example.location) is True
    with tempfile.TemporaryDirectory() as empty:
        file = Path(empty, "notes.txt")
        file.write_text("no weights")
        for other in (Path(empty), file, Path(empty, "nothing")):
            assert made.recognises(other) is False, other
            assert isinstance(made.stands_in(other), bool), other
    assert made.needs
    assert not isinstance(made.hub_files, str), "hub_files is a list of patterns"


def _read(example: Example) -> None:
    files = example.read()
    assert files.weight_files, "there are weight files"
    assert all(Path(path).is_file() for path in files.weight_files), files.weight_files
    assert files.num_tensors in (0, len(example.tensors)), files.num_tensors
    assert files.hf_config.get("architectures"), "hf_config is that of a config.json"
    assert Path(files.tokenizer_dir).is_dir(), files.tokenizer_dir


def _without_weights(example: Example) -> None:
    """Damaged weight files are no error where weights are made up. Of formats whose config lies
    beside them."""
    if example.location.is_file():
        return
    with tempfile.TemporaryDirectory() as made:
        copied = _copied(example, Path(made))
        for path in _weight_files(example, copied):
            path.write_bytes(b"")
        files = example.format().read(copied, with_weights=False)
        assert files.hf_config == example.read().hf_config


def _no_torch(example: Example) -> None:
    """Whoever finds files imports no torch."""
    factory = example.registration.factory
    assert isinstance(factory, str), "name the factory as module:attribute"
    module, _, name = factory.partition(":")
    config = example.registration.config
    code = (
        f"import sys; from pathlib import Path; from {module} import {name} as make\n"
        f"from {config.__module__} import {config.__qualname__} as options\n"
        "made = make(options()); made.recognises(Path(sys.argv[1]))\n"
        "made.read(Path(sys.argv[1]), with_weights=True)\n"
        "assert 'torch' not in sys.modules, 'finding files imports torch'"
    )
    command = [sys.executable, "-c", code, str(example.location)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _headers(example: Example) -> None:
    infos, weight_files = example.open().tensors(), example.read().weight_files
    assert set(infos) == set(example.tensors)
    for name, tensor in example.tensors.items():
        info = infos[name]
        assert info.shape == tuple(tensor.shape), f"{name}: {info.shape}"
        assert info.dtype == tensor.dtype, f"{name}: {info.dtype}"
        assert info.file in weight_files, f"{name} is in {info.file}"


def _slices(example: Example) -> None:
    """Whole tensors, halves, single entries and none, with little memory and with much."""
    source = example.open()
    for name, tensor in example.tensors.items():
        for dim, size in enumerate(tensor.shape):
            bounds = {(0, size), (0, size // 2), (size // 2, size), (size - 1, size), (0, 0)}
            for start, stop in bounds:
                for staging_bytes in STAGING_BYTES:
                    _check_slice(source, name, tensor, dim, start, stop, staging_bytes)


def _check_slice(
    source: WeightSource,
    name: str,
    tensor: Tensor,
    dim: int,
    start: int,
    stop: int,
    staging_bytes: int,
) -> None:
    staging = torch.empty(staging_bytes, dtype=torch.uint8)
    want = tensor.narrow(dim, start, stop - start)
    num_rows = math.prod(want.shape[: max(dim, 1)])
    # Rows are valid until the next are asked for.
    parts = [part.clone() for part in source.stream(name, dim, start, stop, staging)]
    where = f"{name}, dimension {dim}, {start} to {stop}: "
    assert all(part.dim() == 2 for part in parts), where + "rows come as matrices"
    found = torch.cat(parts) if parts else tensor.new_empty(0)
    assert found.numel() == want.numel(), where + f"{tuple(found.shape)}"
    if want.numel():
        assert found.dtype == tensor.dtype, where + str(found.dtype)
        assert found.shape[0] == num_rows, where + f"{found.shape[0]} rows, not {num_rows}"
        assert torch.equal(found, want.reshape(num_rows, -1)), where + "other values"


def _threads(example: Example) -> None:
    """Several threads read one source, each with memory of its own."""
    source = example.open()

    def read(name: str) -> None:
        tensor = example.tensors[name]
        _check_slice(source, name, tensor, 0, 0, tensor.shape[0], STAGING_BYTES[1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, list(example.tensors) * 8))


def _damaged(example: Example) -> None:
    """A weight file that was cut off is a ModelError that names it, at the latest when it is
    read."""
    with tempfile.TemporaryDirectory() as made:
        for index in range(len(example.read().weight_files)):
            copied = _copied(example, Path(made, str(index)))
            path = _weight_files(example, copied)[index]
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            damaged = Example(example.registration, copied, example.tensors, example.dtype)
            try:
                for case in (_headers, _slices):
                    case(damaged)
            except ModelError as error:
                if str(path) not in str(error):
                    raise AssertionError(f"this does not name {path}: {error}") from error
            else:
                raise AssertionError(f"{path} is half of what it was, and nothing is said")


def _copied(example: Example, folder: Path) -> Path:
    copied = folder / example.location.name
    if example.location.is_dir():
        shutil.copytree(example.location, copied)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(example.location, copied)
    return copied


def _weight_files(example: Example, copied: Path) -> list[Path]:
    """The copies of the weight files."""
    paths = (Path(path) for path in example.read().weight_files)
    return [copied / path.relative_to(example.location) for path in paths]


_CHECKS: dict[str, Callable[[Example], None]] = {
    "found": _found,
    "read": _read,
    "without_weights": _without_weights,
    "no_torch": _no_torch,
    "headers": _headers,
    "slices": _slices,
    "threads": _threads,
    "damaged": _damaged,
}
CASES = list(_CHECKS)
