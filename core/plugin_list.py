"""The command `nodeweave plugins`: what is loaded, from where, and what it registers.

Loads every plugin as a start does, and nothing else: no model, no torch, no process.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from core.errors import ConfigError
from core.plugin.hookspecs import Registration
from core.plugin.plugin_manager import LoadedPlugin, PluginManager, Registered
from core.settings.compose import blocklist, parse_overrides

HELP = """\
usage: nodeweave plugins [--json] [plugins.blocklist=[NAME,...]]
       (or: python -m core.run plugins ...)

List the plugins that a start would load: from which distribution and module each comes, the hooks
it implements, and the names it registers in each family, with the options they take.

flags:
  --json                 one JSON object instead of text
  --help
"""


def main(arguments: Sequence[str]) -> int:
    """Run it with the words after "plugins"; returns the exit status. Raises PluginError where a
    plugin can't be loaded."""
    flags = _parse_flags(arguments)
    if flags.help:
        print(HELP, end="")
        return 0
    overrides = parse_overrides(flags.words)
    for override in overrides:
        if override.key != "plugins.blocklist":
            raise ConfigError(
                f"{override.target}={override.text} does not change which plugins are loaded; "
                "`nodeweave plugins` takes plugins.blocklist=[NAME,...] only"
            )
    blocked = blocklist(overrides)
    manager = PluginManager.load(blocked)
    print(to_json(manager, blocked) if flags.json else to_text(manager, blocked), flush=True)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `nodeweave plugins --help` shows the flags")


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="nodeweave plugins", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args(arguments)


def to_text(manager: PluginManager, blocked: Sequence[str]) -> str:
    """For a person: a paragraph for each plugin, in the order they are loaded: ours first."""
    paragraphs = [_paragraph(plugin) for plugin in manager.loaded()]
    paragraphs += [f"{name}: not loaded (plugins.blocklist)" for name in blocked]
    return "\n\n".join(paragraphs)


def _paragraph(plugin: LoadedPlugin) -> str:
    lines = [
        f"{plugin.name} ({plugin.distribution} {plugin.version}, module {plugin.module})",
        f"  hooks: {', '.join(plugin.hooks)}",
    ]
    for registered in plugin.registered:
        registration = registered.registration
        line = f"  {registered.family}: {registration.name}"
        if registration.summary:
            line += f" - {registration.summary}"
        if registered.overridden_by is not None:
            line += f" (not used: {registered.overridden_by} overrides it)"
        lines.append(line)
        if names := ", ".join(_options(registration)):
            lines.append(f"      options: {names}")
    return "\n".join(lines)


def to_json(manager: PluginManager, blocked: Sequence[str]) -> str:
    """For a program; keys are added, never renamed."""
    plugins: list[dict[str, Any]] = [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "module": plugin.module,
            "hooks": plugin.hooks,
            "registrations": [_registration(registered) for registered in plugin.registered],
        }
        for plugin in manager.loaded()
    ]
    return json.dumps({"plugins": plugins, "blocked": list(blocked)}, indent=2)


def _registration(registered: Registered) -> dict[str, Any]:
    registration = registered.registration
    factory = registration.factory
    if not isinstance(factory, str):
        factory = getattr(factory, "__qualname__", repr(factory))
    return {
        "family": registered.family,
        "name": registration.name,
        "summary": registration.summary,
        "factory": factory,
        "options": _options(registration),
        "for_serving": registration.for_serving,
        "overridden_by": registered.overridden_by,
    }


def _options(registration: Registration) -> list[str]:
    return [field.name for field in dataclasses.fields(registration.config)]
