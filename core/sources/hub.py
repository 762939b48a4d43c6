"""Model folders from the Hugging Face Hub. huggingface_hub caches them by its own rules."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.disk.disk_room import no_room, says_no_room
from core.errors import ModelError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Beside weights and what belongs to a tokenizer; nothing that would be run.
_WANTED = ("*.json", "*.jinja")
_UNWANTED = ["original/*", "consolidated*"]


def is_repo_id(path: str) -> bool:
    """Whether a model.path that is no local file reads like "owner/name"."""
    return _REPO_ID.fullmatch(path) is not None


def fetch_from_hub(repo_id: str, files: Sequence[str]) -> Path:
    """The local folder of a repository, fetched first where it is not in the Hub's cache.
    `files`: patterns of what is wanted beside configs and chat templates.

    Shows huggingface_hub's own progress bars on a terminal. Blocks until everything is there.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    wanted = [*_WANTED, *files]
    advice = "or set model.path to a local folder that holds the model"
    try:
        folder: Any = snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=_UNWANTED)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model.path={repo_id!r} is gated on the Hugging Face Hub: accept its terms there, "
            f"set HF_TOKEN to a token that may read it, {advice}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model.path={repo_id!r} is neither a local path nor a repository on the Hugging Face "
            f"Hub that can be seen without (or with the given) HF_TOKEN; check the name, {advice}"
        ) from error
    except Exception as error:  # its HTTP library, and so its errors, differ between versions
        if says_no_room(error):
            raise no_room(
                Path(HF_HUB_CACHE),
                _missing_bytes(repo_id, wanted),
                f"for model.path={repo_id!r}",
                "HF_HUB_CACHE",
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model.path={repo_id!r} is not a local path, and the Hugging Face Hub can't be "
            f"reached ({reason[0]}); check the network, {advice}"
        ) from error
    return Path(folder)


def _missing_bytes(repo_id: str, wanted: Sequence[str]) -> int:
    """What is not in the cache yet of a repository's files; 0 where the Hub does not say."""
    from huggingface_hub import snapshot_download

    try:
        files: Any = snapshot_download(
            repo_id, allow_patterns=wanted, ignore_patterns=_UNWANTED, dry_run=True
        )
        return sum(file.file_size for file in files if file.will_download)
    except Exception:  # an older library, or the network; the user's error is another one
        return 0
