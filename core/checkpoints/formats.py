"""Which formats of checkpoints there are, and which of them a place is in. Imports no torch.

Knows formats as strings only: "package.module:attribute" by name, imported when they are asked.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

from core.errors import ModelError
from core.interfaces.checkpoint import CheckpointFormat

FORMATS: Mapping[str, str] = {
    "safetensors": "plugins.checkpoints.safetensors:SafetensorsFormat",
    "gguf": "plugins.checkpoints.gguf:GGUFFormat",
}


def load_format(name: str, formats: Mapping[str, str] = FORMATS) -> CheckpointFormat:
    """The format of that name, which must be one of `formats`."""
    module, _, attribute = formats[name].partition(":")
    made: CheckpointFormat = getattr(importlib.import_module(module), attribute)()
    return made


def find_format(
    location: Path, wanted: str = "auto", formats: Mapping[str, str] = FORMATS
) -> tuple[str, CheckpointFormat]:
    """The name and format of a place that exists.

    `wanted` decides between several that recognise it. Raises ModelError where several do and
    `wanted` is none of them, and where none takes the place.
    """
    known = {name: load_format(name, formats) for name in formats}
    found = [name for name, each in known.items() if each.recognises(location)]
    if not found:
        found = [name for name, each in known.items() if each.stands_in(location)][:1]
    if not found:
        needed = ", or ".join(each.needs for each in known.values())
        raise ModelError(f"{location} is no model; needed: {needed}")
    if wanted in found:
        return wanted, known[wanted]
    if len(found) > 1:
        raise ModelError(
            f"{location} holds weights of several formats: {', '.join(found)}; choose one of them "
            "by model.load_format, or remove the files of the others"
        )
    return found[0], known[found[0]]
