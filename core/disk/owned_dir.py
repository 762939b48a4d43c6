"""Temporary folders that the next process removes where their owner did not live to do it.

The owner holds a lock on a file in the folder; the kernel lets go of it however the owner ends. A
folder is swept away only where it has such a file, nobody holds the lock, and it is this user's
alone. Knows nothing of what the folders hold.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OWNER = ".owner"


class OwnedDir:
    """A new folder of mode 0700 that lives as long as this process, or until `remove`."""

    def __init__(self, parent: Path | str, prefix: str) -> None:
        """Sweep `parent` for folders with this prefix whose owners died, then make one. Raises
        OSError where that can't be done."""
        sweep(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock_fd: int | None = None
        # Locked before it has the name that a sweep looks for. File systems without locks, or
        # without room, do without: such a folder is never swept.
        new = self.path / f"{_OWNER}-new"
        with contextlib.suppress(OSError):
            self._lock_fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(self.path / _OWNER)

    def remove(self) -> None:
        """Delete it with all it holds; again is no error."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def sweep(parent: Path | str, prefix: str) -> None:
    """Remove folders in `parent` whose names begin with `prefix` and whose owners are dead."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(parent)):
            if entry.name.startswith(prefix) and _is_private(entry):
                with contextlib.suppress(OSError), _abandoned(Path(entry.path)):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_private(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder (no link to one) that this user made and only this user may enter."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and stat.S_IMODE(status.st_mode) == stat.S_IRWXU
    )


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[None]:
    """Holds the dead owner's lock. Raises OSError where there is no such lock or it is held."""
    name = folder / _OWNER
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(name)):
            raise FileNotFoundError(name)  # another sweep came first
        yield
    finally:
        os.close(fd)
