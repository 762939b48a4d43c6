"""`nodeweave rules`: which rules the installed plugins bring."""

from collections.abc import Sequence

from core.errors import ConfigError
from core.plugin.plugin_manager import PluginManager


def main(words: Sequence[str]) -> int:
    """Print a line for each; `words` are those after "rules"."""
    if words:
        raise ConfigError(f"`nodeweave rules` takes no arguments, not {words[0]!r}")
    table = PluginManager.load().table("acme_rule")
    for name in sorted(table):
        print(f"{name:<12} {table.get(name).summary} ({table.plugin_of(name)})")
    return 0
