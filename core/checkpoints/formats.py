"""Which format of checkpoints a place is in. Knows formats by their table; imports no torch."""

from pathlib import Path

from core.errors import ModelError, PluginError
from core.interfaces.checkpoint import CheckpointFormat, WeightGenerator
from core.plugin.plugin_manager import AUTO, PluginTable
from core.settings.config import ModelConfig, PluginChoice

KEY = "model.load_format"
OPTIONS_KEY = "model.load_options"


def format_choice(model: ModelConfig, name: str | None = None) -> PluginChoice:
    """What a configuration chooses; or the format of that name, with options if it is that."""
    chosen = name is None or name == model.load_format
    return PluginChoice(
        name=model.load_format if name is None else name,
        options=model.load_options if chosen else {},
    )


def make_format(formats: PluginTable, choice: PluginChoice) -> CheckpointFormat | WeightGenerator:
    """The format that is chosen. Raises PluginError where there is none of that name, ConfigError
    for options that it does not take."""
    made: CheckpointFormat | WeightGenerator = formats.create(
        choice, key=KEY, options_key=OPTIONS_KEY
    )
    return made


def makes_weights_up(formats: PluginTable, wanted: PluginChoice) -> bool:
    """Whether what is chosen reads no weights."""
    return wanted.name != AUTO and isinstance(make_format(formats, wanted), WeightGenerator)


def generators(formats: PluginTable) -> list[str]:
    """The names under which weights are made up."""
    return [name for name in formats if makes_weights_up(formats, PluginChoice(name=name))]


def hub_weight_files(formats: PluginTable, wanted: PluginChoice) -> list[str]:
    """Patterns of the weight files that what is chosen takes from the Hub."""
    if wanted.name == AUTO:
        every = _all_formats(formats).values()
        return list(dict.fromkeys(pattern for each in every for pattern in each.hub_files))
    made = make_format(formats, wanted)
    if isinstance(made, WeightGenerator):
        return []
    if not made.hub_files:
        raise ModelError(
            f"{KEY}={wanted.name} takes no files of a repository on the Hugging Face Hub; needed: "
            f"{made.needs}; fetch it and set model.path to it"
        )
    return list(made.hub_files)


def find_format(
    location: Path, wanted: PluginChoice, formats: PluginTable
) -> tuple[str, CheckpointFormat]:
    """The name and format of a place that exists.

    `wanted` decides between several that recognise it. Raises ModelError where several do and
    `wanted` is none of them, and where none takes the place.
    """
    if wanted.name != AUTO:
        made = make_format(formats, wanted)
        if not isinstance(made, WeightGenerator) and _asked(formats, wanted.name, made, location):
            return wanted.name, made
    known = _all_formats(formats)
    found = [name for name, each in known.items() if _asked(formats, name, each, location)]
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


def _asked(formats: PluginTable, name: str, format_: CheckpointFormat, location: Path) -> bool:
    """Whether a format recognises a place."""
    try:
        return format_.recognises(location)
    except Exception as error:  # a plugin's own; it may never raise
        raise PluginError(
            f"checkpoint_format plugin {name!r} (from {formats.plugin_of(name)}) failed to look at "
            f"{location}: {type(error).__name__}: {error}\n"
            f"choose another by {KEY}, or start without it: "
            f"plugins.blocklist=[{formats.plugin_of(name)}]"
        ) from error


def _all_formats(formats: PluginTable) -> dict[str, CheckpointFormat]:
    made = {name: make_format(formats, PluginChoice(name=name)) for name in formats}
    return {name: each for name, each in made.items() if not isinstance(each, WeightGenerator)}
