"""What to tell a user whose disk is full, or may not be written: which folder, what is needed, what
is free.

Knows which folders an engine writes to, nothing of what it writes there.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.errors import ResourceError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_TEXTS = tuple(os.strerror(number) for number in _NO_ROOM)  # as other programs quote them
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_LITTLE_BYTES = 64 << 20
_MAX_TEXT = 200


def require_room(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise ResourceError where `folder`'s disk has fewer bytes free; `purpose`: "to unpack x"."""
    if free_bytes(folder) < needed_bytes:
        raise no_room(folder, needed_bytes, purpose)


def no_room(
    folder: Path, needed_bytes: int, purpose: str, variable: str = "NODEWEAVE_CACHE"
) -> ResourceError:
    """`needed_bytes`: 0 where nobody knows; `variable`: of the environment, sets the folder."""
    needed = f"{_size(needed_bytes)} needed, " if needed_bytes else ""
    return ResourceError(
        f"no room {purpose} in {folder}: {needed}{_free_text(folder)}; make room there, or set "
        f"{variable} to a folder on another disk"
    )


def says_no_room(error: BaseException) -> bool:
    """Whether this error, or one that caused it, comes of a full disk or a quota."""
    return any(
        (isinstance(found, OSError) and found.errno in _NO_ROOM)
        or any(text in str(found) for text in _NO_ROOM_TEXTS)
        for found in _chain(error)
    )


def explained(error: Exception, cache: Path) -> Exception:
    """A ResourceError that names the folders which are full, or the one that can't be written,
    where that is what happened; else the error itself. For whatever writes files somewhere inside
    a library: compilers, NCCL. `cache`: core.disk.cache.cache_root()."""
    if isinstance(error, ResourceError):
        return error
    if not says_no_room(error):
        return _refused(error, cache) or error
    folders = dict(_folders(error, cache))
    full = {place: path for place, path in folders.items() if free_bytes(path) < _LITTLE_BYTES}
    texts = [f"{_free_text(path)} in {path} ({place})" for place, path in (full or folders).items()]
    return ResourceError(
        f"a disk is full ({type(error).__name__}: {str(error)[:_MAX_TEXT]}): {'; '.join(texts)}; "
        "make room there, or choose folders on another disk"
    )


def free_bytes(folder: Path) -> int:
    """Bytes this user may still write where `folder` is or will be; 0 where no file can be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    state = os.statvfs(folder)
    has_inodes = state.f_files == 0 or state.f_favail > 0  # 0 in all: it does not count them
    return state.f_bavail * state.f_frsize if has_inodes else 0


def _folders(error: BaseException, cache: Path) -> Iterator[tuple[str, Path]]:
    """What the engine writes to, by what sets it; the one that the error names first."""
    for found in _chain(error):
        if isinstance(found, OSError) and isinstance(found.filename, str):
            yield "where it was written", Path(found.filename).absolute().parent
    yield from _own_folders(cache)


def _own_folders(cache: Path) -> Iterator[tuple[str, Path]]:
    kernels = os.environ.get("TRITON_CACHE_DIR")
    if kernels:
        yield "compiled kernels: engine.kernel_cache_dir", Path(kernels)
    yield "the cache: NODEWEAVE_CACHE", cache
    yield "temporary files: TMPDIR", Path(tempfile.gettempdir())
    if Path("/dev/shm").is_dir():
        yield "shared memory of processes; of a container --shm-size", Path("/dev/shm")


def _refused(error: BaseException, cache: Path) -> ResourceError | None:
    """Where a file of a folder that the engine writes to could not be made: read-only, or of
    another user."""
    for found in _chain(error):
        if not isinstance(found, OSError) or found.errno not in _REFUSED:
            continue
        if not isinstance(found.filename, str):
            continue
        written = Path(found.filename).absolute()
        for place, folder in _own_folders(cache):
            if written.is_relative_to(folder.absolute()):
                return ResourceError(
                    f"can't write to {folder} ({place}): {found.strerror}: "
                    f"{str(written)[:_MAX_TEXT]}; let this user write there, or choose another "
                    "folder"
                )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _free_text(folder: Path) -> str:
    return f"{_size(free_bytes(folder))} free"


def _size(num_bytes: int) -> str:
    """1610612736 -> "1.5 GiB"."""
    for exponent, suffix in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.1f} {suffix}"
    return f"{num_bytes} bytes"
