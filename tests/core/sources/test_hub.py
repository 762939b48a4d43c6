"""Hub ids: a fetched folder is used like a local one; each refusal says what to do."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from core.errors import ModelError, ResourceError
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from core.sources.hub import is_repo_id
from tests.support.formats import FILE_PLUGINS
from tests.support.models import ignore_progress, write_tiny_model


def test_a_fetched_folder_is_used_like_a_local_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "snapshot", "llama")
    asked: list[tuple[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = resolve_files(ModelConfig(name="m", path="owner/name"), FILE_PLUGINS, ignore_progress)
    assert files.weight_files == [str(folder / "model.safetensors")]
    assert asked == [("owner/name", ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"])]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.GatedRepoError, ["gated", "HF_TOKEN", "local folder"]),
        (
            hub_errors.RepositoryNotFoundError,
            ["neither a local path nor a repository", "local folder"],
        ),
        (hub_errors.LocalEntryNotFoundError, ["can't be reached", "local folder"]),
        (TimeoutError, ["can't be reached", "too slow"]),
    ],
)
def test_refusals_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: list[str]
) -> None:
    takes_response = issubclass(kind, hub_errors.HfHubHTTPError)
    response = SimpleNamespace(headers={}, request=None)

    def refuse(repo_id: str, **options: Any) -> str:
        raise kind("too slow", response=response) if takes_response else kind("too slow")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError) as error:
        resolve_files(ModelConfig(name="m", path="owner/name"), FILE_PLUGINS, ignore_progress)
    assert "owner/name" in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_full_cache_is_told_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own library says it in an error of its own, which another one caused."""

    def refuse(repo_id: str, *, dry_run: bool = False, **options: Any) -> Any:
        if dry_run:
            sizes = [(3 << 30, True), (5 << 30, False)]
            return [SimpleNamespace(file_size=size, will_download=w) for size, w in sizes]
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("Data processing error") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ResourceError, match=r"for model.path='owner/name' in .*: 3.0 GiB needed"):
        resolve_files(ModelConfig(name="m", path="owner/name"), FILE_PLUGINS, ignore_progress)


def test_what_reads_like_a_hub_id() -> None:
    for path in ("owner/name", "Qwen/Qwen3-8B", "a.b/c_d-1.5"):
        assert is_repo_id(path)
    for path in ("name", "/owner/name", "./a/b", "../a", "a/b/c", "~/x", "a b/c", "-x/y", ""):
        assert not is_repo_id(path)
