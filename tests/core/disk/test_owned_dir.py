"""Folders that the next process sweeps away where their owner was killed, and only those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.disk.owned_dir import OwnedDir, sweep

ROOT = Path(__file__).parents[3]
OWNER = """
import sys, signal
from core.disk.owned_dir import OwnedDir
made = OwnedDir(sys.argv[1], "run-")
(made.path / "socket").touch()
print(made.path, flush=True)
signal.pause()
"""


def killed_owner(parent: Path) -> Path:
    """The folder of a process that was killed (and for now lives on as a zombie)."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    sweep(parent, "run-")
    assert folder.is_dir(), "its owner lives"
    process.kill()
    process.communicate()
    return folder


def test_a_killed_owner_s_folder_is_removed_by_the_next(tmp_path: Path) -> None:
    left = killed_owner(tmp_path)
    assert (left / "socket").exists()
    made = OwnedDir(tmp_path, "run-")
    assert not left.exists()
    other = OwnedDir(tmp_path, "run-")
    assert made.path.is_dir()
    for folder in (made, other, made):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    left = killed_owner(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    left.rename(elsewhere / left.name)
    (tmp_path / "run-link").symlink_to(elsewhere / left.name)
    open_to_others = killed_owner(tmp_path)
    open_to_others.chmod(0o755)
    without_lock = tmp_path / "run-plain"
    without_lock.mkdir(mode=0o700)
    (tmp_path / "run-file").touch()
    locked_by_link = tmp_path / "run-tricked"
    locked_by_link.mkdir(mode=0o700)
    (locked_by_link / ".owner").symlink_to(elsewhere / left.name / ".owner")
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path, "run-")
    sweep(elsewhere, "other-")
    assert sorted(tmp_path.rglob("*")) == before
    sweep(tmp_path / "missing", "run-")


def test_without_room_for_a_lock_it_is_a_folder_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        made = OwnedDir(tmp_path, "run-")
    sweep(tmp_path, "run-")
    assert made.path.is_dir()
    made.remove()
