"""Which config groups there are and what can be chosen in each: our conf/ and every plugin's.

Reads folder listings and the first comment line of files. Knows nothing of Hydra or of plugins;
it gets their search paths.
"""

import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from core.errors import ConfigError
from core.settings.habits import preset_like, setting
from core.settings.schema import did_you_mean

OWN_CONFIGS = "pkg://conf"


class Catalog:
    """Groups ("model") and their options ("smollm2") with a one-line summary each."""

    def __init__(self, search_paths: Sequence[str]) -> None:
        self.groups: dict[str, dict[str, str]] = {}
        for search_path in (OWN_CONFIGS, *search_paths):
            for group, name, summary in _walk(_open(search_path), ""):
                # The first path wins, as it does for Hydra.
                self.groups.setdefault(group, {}).setdefault(name, summary)

    def require_option(self, group: str, name: str) -> None:
        """Raise ConfigError, naming the options there are, unless `name` is one of `group`."""
        options = self.groups[group]
        if name in options:
            return
        hint = "\nfor any other number of ranks: parallel.tp=N" if group == "parallel" else ""
        if group == "model":
            hint = _other_model(name, options)
        raise ConfigError(
            f"{group}={name}: there is no such {group} config{did_you_mean(name, options)}\n"
            f"{group} configs: {', '.join(options)}{hint}"
        )


def _other_model(name: str, models: Iterable[str]) -> str:
    preset = preset_like(name, list(models))
    shown = name if set(name) & set("/.~") else "FOLDER"
    alike = f"; +model={preset} is the preset of that model" if preset else ""
    return (
        "\na Hugging Face folder, a .gguf file or a Hub id is served by:\n"
        f"  +model=custom {setting('model.path', shown)}{alike}"
    )


def _open(search_path: str) -> Traversable:
    scheme, _, place = search_path.partition("://")
    if scheme == "file":
        folder: Traversable = Path(place)
    else:
        try:
            folder = importlib.resources.files(place.replace("/", "."))
        except ImportError as error:
            raise ConfigError(f"config search path {search_path}: {error}") from error
    if not folder.is_dir():
        raise ConfigError(f"config search path {search_path}: there is no such folder")
    return folder


def _walk(folder: Traversable, group: str) -> Iterator[tuple[str, str, str]]:
    for item in sorted(folder.iterdir(), key=_natural):
        if item.is_dir():
            if not item.name.startswith(("_", ".")):
                yield from _walk(item, f"{group}/{item.name}" if group else item.name)
        elif group and item.name.endswith(".yaml"):
            with item.open(encoding="utf-8") as lines:
                first = lines.readline().strip()
            summary = first.removeprefix("#").strip() if first.startswith("#") else ""
            yield group, item.name.removesuffix(".yaml"), summary


def _natural(item: Traversable) -> list[tuple[str, int]]:
    """Sorts tp2 before tp16."""
    parts = re.findall(r"(\D*)(\d*)", item.name.removesuffix(".yaml"))
    return [(text, int(digits or 0)) for text, digits in parts]
