"""Safetensors files: slices are right, and damaged files are named with what is wrong."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.disk.file_rows import RowFile
from core.errors import ModelError
from plugins.checkpoints._safetensors.header import read_header
from plugins.checkpoints._safetensors.source import SafetensorsSource
from tests.support.weights import read_slice

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(6, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.arange(24, dtype=torch.float16).view(2, 3, 4),
    "scalar": torch.tensor(3.0),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_every_slice_of_every_dimension(path: Path) -> None:
    source = SafetensorsSource([str(path)])
    assert set(source.tensors()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = source.tensors()[name]
        assert (info.shape, info.dtype, info.file) == (tuple(tensor.shape), tensor.dtype, str(path))
        for dim, size in enumerate(tensor.shape):
            for start in range(size):
                for stop in range(start, size + 1):
                    expected = tensor.narrow(dim, start, stop - start)
                    assert torch.equal(read_slice(source, name, dim, start, stop), expected)
    assert read_slice(source, "scalar", 0, 0, 1).item() == 3.0


def test_two_files_are_one_checkpoint_but_no_name_is_in_both(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": TENSORS["a"]}, first)
    save_file({"b": TENSORS["b"]}, second)
    source = SafetensorsSource([str(first), str(second)])
    assert source.tensors()["b"].file == str(second)
    save_file({"a": TENSORS["a"]}, second)
    with pytest.raises(ModelError, match=r"tensor a is in both .*1\.safetensors and .*2\."):
        SafetensorsSource([str(first), str(second)])


def test_every_way_of_cutting_it_off_is_noticed(path: Path) -> None:
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError, match="fetch the file again") as error:
            SafetensorsSource([str(path)])
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["a"].update(dtype="F4"), "tensor a has the unknown dtype 'F4'"),
        (lambda h: h["a"].update(shape=[7, 4]), "tensor a of shape .7, 4. needs 112 bytes, not 96"),
        (lambda h: h["a"].update(shape=[-6, -4]), "not the expected JSON"),
        (lambda h: h["a"].update(data_offsets=[0]), "not the expected JSON"),
        (lambda h: h["a"].pop("shape"), "not the expected JSON"),
        (lambda h: h.update(a=3), "not the expected JSON"),
        (lambda h: h["a"].update(data_offsets=[10**15, 10**15 + 96]), "cut off"),
        (lambda h: h.pop("a"), "tensor scalar at byte 96 of the data leaves a gap before it"),
        (lambda h: h.update(more=h["b"]), "overlaps the one before it"),
    ],
)
def test_wrong_headers_are_named(
    path: Path, change: Callable[[dict[str, dict[str, object]]], object], words: str
) -> None:
    rewrite_header(path, change)
    with pytest.raises(ModelError, match=words):
        read_header(str(path))


def test_shapes_without_end_cost_nothing(path: Path) -> None:
    """80,000 dimensions of 2**63 - 1 took seconds to multiply."""

    def change(header: dict[str, dict[str, object]]) -> None:
        header["a"]["shape"] = [(1 << 63) - 1] * 80_000

    rewrite_header(path, change)
    begin_s = time.process_time()
    with pytest.raises(ModelError, match=r"not the expected JSON.*length <= 8"):
        read_header(str(path))
    assert time.process_time() - begin_s < 2


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for name, words in (("pipe", "it is a pipe"), ("device", "it is a device")):
        with pytest.raises(ModelError, match=words):
            read_header(str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(ModelError, match=words):
            RowFile(str(tmp_path / f"{name}.safetensors"))


def test_random_bytes_and_folders_are_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(bytes(range(256)) * 4)
    for path in (noise, tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ModelError, match=path.name):
            read_header(str(path))


def test_bytes_that_belong_to_no_tensor_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelError, match=r"model\.safetensors .*: 1 bytes follow its last tensor"):
        read_header(str(path))


@pytest.mark.parametrize("staging_bytes", [1, 24, 100])
def test_buffers_smaller_than_a_row_or_a_tensor_do(path: Path, staging_bytes: int) -> None:
    source = SafetensorsSource([str(path)])
    for name in ("a", "b", "c"):
        tensor = TENSORS[name]
        for dim, size in enumerate(tensor.shape):
            found = read_slice(source, name, dim, 1, size, staging_bytes)
            assert torch.equal(found, tensor.narrow(dim, 1, size - 1))


def test_columns_far_apart_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows much wider than what is kept of them: the rest is not read."""
    wide = torch.arange(4 * 100_000, dtype=torch.float32).view(4, 100_000)
    save_file({"wide": wide}, tmp_path / "x.safetensors")
    source = SafetensorsSource([str(tmp_path / "x.safetensors")])
    read_bytes = 0
    preadv = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read_bytes
        read_bytes += sum(len(buffer) for buffer in buffers)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    for dim, start, stop, least in ((1, 70_000, 70_010, 160), (0, 2, 3, 400_000)):
        read_bytes = 0
        found = read_slice(source, "wide", dim, start, stop)
        assert torch.equal(found, wide.narrow(dim, start, stop - start))
        assert read_bytes == least


def test_a_file_cut_off_while_it_is_read_is_named(path: Path) -> None:
    source = SafetensorsSource([str(path)])
    path.write_bytes(path.read_bytes()[:-4])
    last = max(TENSORS, key=lambda name: data_end(path, name))
    with pytest.raises(ModelError, match=r"model\.safetensors ends at byte \d+, in the midst"):
        read_slice(source, last, 0, 0, (TENSORS[last].shape or (1,))[0])


def data_end(path: Path, name: str) -> int:
    """Where a tensor's data ends, by a header that still is whole."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return int(header[name]["data_offsets"][1])
