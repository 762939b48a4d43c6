"""One clear error for a full disk: folder, needed, free."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from core.disk import disk_room as module
from core.disk.disk_room import explained, free_bytes, no_room, require_room, says_no_room
from core.errors import ModelError, ResourceError

FULL = os.strerror(errno.ENOSPC)


def caused_by(cause: Exception) -> Exception:
    try:
        raise RuntimeError("compilation failed") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, FULL), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/x/y"), True),
        (caused_by(OSError(errno.ENOSPC, FULL)), True),
        (RuntimeError(f"ptxas fatal: {FULL}"), True),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (caused_by(ValueError("x")), False),
    ],
)
def test_what_comes_of_a_full_disk(error: Exception, expected: bool, tmp_path: Path) -> None:
    assert says_no_room(error) is expected
    told = explained(error, tmp_path)
    assert isinstance(told, ResourceError) if expected else told is error


def test_needed_and_free_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 3 << 20)
    require_room(tmp_path, 3 << 20, "to unpack x")
    with pytest.raises(ResourceError) as error:
        require_room(tmp_path, 5 << 30, "to unpack x")
    assert str(error.value) == (
        f"no room to unpack x in {tmp_path}: 5.0 GiB needed, 3.0 MiB free; make room there, or set "
        "NODEWEAVE_CACHE to a folder on another disk"
    )
    assert ": 3.0 MiB free;" in str(no_room(tmp_path, 0, "for files"))


def test_the_folders_that_are_full_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kernels))
    monkeypatch.setattr(module, "free_bytes", lambda folder: 512 if folder == kernels else 1 << 40)
    error = caused_by(OSError(errno.ENOSPC, FULL, str(tmp_path / "sources" / "x.c")))
    text = str(explained(error, tmp_path))
    assert f"512 bytes free in {kernels} (compiled kernels: engine.kernel_cache_dir)" in text
    assert "NODEWEAVE_CACHE" not in text
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1 << 40)
    text = str(explained(error, tmp_path))  # freed again meanwhile, or a quota
    assert f"1024.0 GiB free in {tmp_path / 'sources'} (where it was written)" in text
    assert "NODEWEAVE_CACHE" in text


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_cant_be_written_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where compiled kernels are on a read-only disk, and one that is needed is not there."""
    kernels, elsewhere = tmp_path / "kernels", tmp_path / "elsewhere"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kernels))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    why = os.strerror(number)
    error = caused_by(OSError(number, why, str(kernels / "AB" / "x.ptx")))
    told = explained(error, tmp_path / "cache")
    assert isinstance(told, ResourceError)
    assert str(told) == (
        f"can't write to {kernels} (compiled kernels: engine.kernel_cache_dir): {why}: "
        f"{kernels / 'AB' / 'x.ptx'}; let this user write there, or choose another folder"
    )
    other = OSError(number, why, str(elsewhere / "weights"))
    assert explained(other, tmp_path / "cache") is other


def test_an_error_that_says_all_stays(tmp_path: Path) -> None:
    error = no_room(tmp_path, 1, FULL)
    assert explained(error, tmp_path) is error
    other = ModelError("damaged")
    assert explained(other, tmp_path) is other


def test_a_disk_without_inodes_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "not" / "there") > 0
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-o", "nr_inodes=2,size=1m"]
    if subprocess.run(["mount", "-t", "tmpfs", *options, "x", folder]).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        (folder / "file").touch()
        assert free_bytes(folder) == 0
    finally:
        subprocess.run(["umount", folder], check=True)
