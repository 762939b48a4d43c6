"""Which kind of tokenizers a folder's is. Knows kinds by their table; imports none's library."""

from pathlib import Path

from core.errors import PluginError
from core.interfaces.tokenizer import TokenizerKind
from core.plugin.plugin_manager import AUTO, PluginTable
from core.settings.config import PluginChoice

KEY = "model.tokenizer_mode"


def make_kind(kinds: PluginTable, name: str) -> TokenizerKind:
    """What `model.tokenizer_mode=name` is. Raises PluginError where there is none of that name."""
    made: TokenizerKind = kinds.create(PluginChoice(name=name), key=KEY)
    return made


def find_kind(folder: Path, wanted: str, kinds: PluginTable) -> TokenizerKind | None:
    """The kind that a folder's tokenizer is of: `wanted`, or where that is auto the first that
    recognises it, in the order of registration. None where none does."""
    if wanted != AUTO:
        return make_kind(kinds, wanted)
    for name in kinds:
        kind = make_kind(kinds, name)
        try:
            if kind.recognises(folder):
                return kind
        except Exception as error:  # a plugin's own; it may never raise
            plugin = kinds.plugin_of(name)
            raise PluginError(
                f"tokenizer plugin {name!r} (from {plugin}) failed to look at {folder}: "
                f"{type(error).__name__}: {error}\n"
                f"choose another by {KEY}, or start without it: plugins.blocklist=[{plugin}]"
            ) from error
    return None


def other_needs(kinds: PluginTable) -> list[str]:
    """What a folder must hold for kinds other than ours to recognise it."""
    return [make_kind(kinds, name).needs for name in kinds if name != "hf"]


def hub_tokenizer_files(kinds: PluginTable, wanted: str) -> list[str]:
    """Patterns of the files that `model.tokenizer_mode=wanted` takes from the Hub."""
    names = list(kinds) if wanted == AUTO else [wanted]
    made = [make_kind(kinds, name) for name in names]
    return list(dict.fromkeys(pattern for kind in made for pattern in kind.hub_files))
