"""Damaged GGUF files: always a ModelError that names the file, never a crash or a wrong read."""

import os
import random
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ModelError
from plugins.checkpoints._gguf import header as gguf_header
from plugins.checkpoints._gguf.header import read_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every type of metadata and two tensors."""
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["one", "two", "three"])
    writer.add_array("a.numbers", [1.0, 2.0, 3.0])
    writer.add_tensor("plain.weight", np.zeros((3, 5), dtype=np.float32))
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor("blocks.weight", np.zeros((4, 68), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_file_itself_is_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    file = read_gguf(str(path))
    assert file.metadata["a.strings"] == ["one", "two", "three"]
    assert file.metadata["a.numbers"] == [1.0, 2.0, 3.0]
    assert (file.count("a.u32"), file.number("a.f64"), file.flag("a.bool", False)) == (
        7,
        0.25,
        True,
    )
    assert file.tensors["plain.weight"].shape == (3, 5)
    assert file.tensors["blocks.weight"].shape == (4, 64)


def test_every_way_of_cutting_it_off_is_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    end = max(t.start + t.num_bytes for t in read_gguf(str(path)).tensors.values())
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.gguf"):
            read_gguf(str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_overwritten_bytes_never_crash(whole: bytes, tmp_path: Path, seed: int) -> None:
    """Either it still reads and every tensor lies inside the file, or it is a ModelError."""
    generator = random.Random(seed)
    damaged = bytearray(whole)
    for _ in range(generator.choice([1, 1, 2, 8])):
        start = generator.randrange(len(whole) - 8)
        value = generator.choice(
            [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, generator.getrandbits(64)]
        )
        width = generator.choice([1, 4, 8])
        damaged[start : start + width] = struct.pack("<Q", value)[:width]
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged)
    try:
        file = read_gguf(str(path))
    except ModelError:
        return
    assert all(t.start + t.num_bytes <= len(whole) for t in file.tensors.values())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"GGML" + raw[4:], "not a GGUF file: it starts with b'GGML'"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "GGUF version 1.*allowed: 2, 3"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "little-endian"),
        (lambda raw: raw[:8] + struct.pack("<Q", 2**60) + raw[16:], "claims .* tensors"),
        (lambda raw: raw.replace(b"blocks.weight", b"\xff" * 13), "not UTF-8"),
        (lambda raw: raw.replace(b"a.f64", b"a.u32"), "'a.u32' is there twice"),
        (lambda raw: raw[:-40], "cut off"),
        (lambda raw: b"", "shorter than a header"),
    ],
)
def test_what_is_wrong_is_named(whole: bytes, tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(whole))
    with pytest.raises(ModelError, match=words):
        read_gguf(str(path))


def test_headers_are_bounded(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header is read into memory, so that its size is limited, not by the file's alone."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    for name, value, words in (
        ("MAX_KEYS", 3, r"claims \d+ metadata keys; allowed: up to 3"),
        ("MAX_TENSORS", 1, "claims 2 tensors; allowed: up to 1"),
        ("MAX_ARRAY_VALUES", 2, "claims 3 values of a.strings"),
        ("MAX_TEXT_BYTES", 3, "longer than 3 bytes"),
        ("MAX_HEADER_BYTES", 100, "larger than 100 bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_header, name, value)
            with pytest.raises(ModelError, match=words):
                read_gguf(str(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf: it is a pipe"):
        read_gguf(str(tmp_path / "model.gguf"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf: No such file"):
        read_gguf(str(tmp_path / "absent.gguf"))
