"""Which format of checkpoints a place is in. Knows formats by their table; imports no torch."""

from pathlib import Path

from core.errors import ModelError
from core.interfaces.checkpoint import CheckpointFormat, WeightGenerator
from core.plugin.plugin_manager import AUTO, PluginTable
from core.settings.config import PluginChoice

KEY = "model.load_format"


def make_format(formats: PluginTable, name: str) -> CheckpointFormat | WeightGenerator:
    """What `model.load_format=name` is. Raises PluginError where there is none of that name."""
    made: CheckpointFormat | WeightGenerator = formats.create(PluginChoice(name=name), key=KEY)
    return made


def makes_weights_up(formats: PluginTable, wanted: str) -> bool:
    """Whether `model.load_format=wanted` reads no weights."""
    return wanted != AUTO and isinstance(make_format(formats, wanted), WeightGenerator)


def generators(formats: PluginTable) -> list[str]:
    """The names under which weights are made up."""
    return [name for name in formats if makes_weights_up(formats, name)]


def hub_weight_files(formats: PluginTable, wanted: str) -> list[str]:
    """Patterns of the weight files that `model.load_format=wanted` takes from the Hub."""
    if wanted == AUTO:
        every = _all_formats(formats).values()
        return list(dict.fromkeys(pattern for each in every for pattern in each.hub_files))
    made = make_format(formats, wanted)
    if isinstance(made, WeightGenerator):
        return []
    if not made.hub_files:
        raise ModelError(
            f"model.load_format={wanted} takes no files of a repository on the Hugging Face Hub; "
            f"needed: {made.needs}; fetch it and set model.path to it"
        )
    return list(made.hub_files)


def find_format(location: Path, wanted: str, formats: PluginTable) -> tuple[str, CheckpointFormat]:
    """The name and format of a place that exists.

    `wanted` decides between several that recognise it. Raises ModelError where several do and
    `wanted` is none of them, and where none takes the place.
    """
    if wanted != AUTO:
        made = make_format(formats, wanted)
        if not isinstance(made, WeightGenerator) and made.recognises(location):
            return wanted, made
    known = _all_formats(formats)
    found = [name for name, each in known.items() if each.recognises(location)]
    if not found:
        found = [name for name, each in known.items() if each.stands_in(location)][:1]
    if not found:
        needed = ", or ".join(each.needs for each in known.values())
        raise ModelError(f"{location} is no model; needed: {needed}")
    if len(found) > 1:
        raise ModelError(
            f"{location} holds weights of several formats: {', '.join(found)}; choose one of them "
            f"by {KEY}, or remove the files of the others"
        )
    return found[0], known[found[0]]


def _all_formats(formats: PluginTable) -> dict[str, CheckpointFormat]:
    made = {name: make_format(formats, name) for name in formats}
    return {name: each for name, each in made.items() if not isinstance(each, WeightGenerator)}
