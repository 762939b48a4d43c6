"""The user's cache of fetched and derived files: where it is, locks, and all-or-nothing writes.

Knows nothing of models. Files become visible under their name only when they are whole.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from core.disk.disk_room import no_room, says_no_room
from core.disk.owned_dir import OwnedDir
from core.errors import ResourceError


def cache_root() -> Path:
    """`$NODEWEAVE_CACHE`, else `nodeweave` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    chosen = os.environ.get("NODEWEAVE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nodeweave"


def cache_dir(*parts: str) -> Path:
    """A folder of the cache, made where it is missing. Raises ResourceError where that fails."""
    path = cache_root().joinpath(*parts)
    try:
        with room_in(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"can't make the cache folder {path} ({error.strerror}); set NODEWEAVE_CACHE to a "
            "folder that can be written"
        ) from error
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that use `folder` waiting; ends with the process at the latest."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_dir(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` (the same file system), removed with all it holds, as are those
    that killed processes left there."""
    made = OwnedDir(folder, ".partial-")
    try:
        yield made.path
    finally:
        made.remove()


def publish_dir(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` with these files appear at once; a process that was first wins."""
    needed_bytes = sum(map(len, files.values()))
    with room_in(folder.parent, needed_bytes), scratch_dir(folder.parent) as scratch:
        whole = scratch / "whole"
        whole.mkdir()
        for name, content in files.items():
            (whole / name).write_bytes(content)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


@contextlib.contextmanager
def room_in(folder: Path, needed_bytes: int = 0, purpose: str = "for files") -> Iterator[None]:
    """Turns a full disk within into a ResourceError; see `core.disk.disk_room.no_room`."""
    try:
        yield
    except OSError as error:
        if says_no_room(error):
            raise no_room(folder, needed_bytes, purpose) from error
        raise
