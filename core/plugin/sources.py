"""Where plugins come from: the built-in ones by name, entry points of installed packages, objects.

Imports a plugin when it is registered, and says whose fault it is where that fails.
"""

import importlib
import importlib.metadata
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from core.errors import ConfigError, PluginError
from core.plugin import hookspecs
from core.plugin.hookspecs import ENTRY_POINT_GROUP, HOOK_PREFIX, Registration, hookspec
from core.settings.schema import did_you_mean

BUILTIN_PLUGINS = (
    "plugins.comm",
    "plugins.moe_a2a",
    "plugins.attention.torch_ref",
    "plugins.attention.cpu",
    "plugins.attention.triton",
    "plugins.parallel",
    "plugins.balancers",
    "plugins.models.llama",
    "plugins.models.qwen3",
    "plugins.models.qwen3_moe",
    "plugins.models.mixtral",
    "plugins.models.deepseek",
    "plugins.models.glm4_moe",
    "plugins.logits_processors",
    "plugins.checkpoints",
    "plugins.tokenizers",
    "plugins.frontends.openai",
    "plugins.exporters",
    "plugins.launchers",
)


@dataclass(frozen=True, slots=True)
class Source:
    """A plugin that can be loaded, and where it comes from."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]


def find_sources(builtins: Sequence[str], objects: Mapping[str, object]) -> dict[str, Source]:
    """Every plugin there is, by name, in the order in which they are loaded. Raises PluginError
    where two have one name."""
    own_version = _own_version()
    sources: dict[str, Source] = {
        name: Source(name, "nodeweave", own_version, _importer(name)) for name in builtins
    }
    for source in _entry_points():
        if source.name in sources:
            raise PluginError(
                f"two plugins are called {source.name!r}: one from "
                f"{sources[source.name].distribution}, one from {source.distribution}; "
                "uninstall one of them"
            )
        sources[source.name] = source
    for name, plugin in objects.items():
        sources[name] = Source(name, "given as an object", "0", _constant(plugin))
    return sources


def require_name(plugin: str, what: str, name: str) -> None:
    """Raise PluginError for a name that could not be typed as a key, a command or a hook."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is None:
        raise PluginError(
            f"plugin {plugin!r} adds the {what} {name!r}, which is no name: those begin with a "
            "letter and hold letters, digits and _ only"
        )


def module_of(plugin: object) -> str:
    if isinstance(plugin, types.ModuleType):
        return plugin.__name__
    return f"{type(plugin).__module__}:{type(plugin).__qualname__}"


def _importer(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def _constant(plugin: object) -> Callable[[], object]:
    return lambda: plugin


def _entry_points() -> Iterator[Source]:
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = point.dist
        name, version = (distribution.name, distribution.version) if distribution else ("?", "?")
        yield Source(point.name, name, version, point.load)


def _own_version() -> str:
    try:
        return importlib.metadata.version("nodeweave")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def register_all(manager: pluggy.PluginManager, sources: Sequence[Source]) -> None:
    """Import every plugin, register it, and check that it keeps to the hooks, those of families
    that plugins add among them. Raises PluginError with its name and the cause."""
    manager.add_hookspecs(hookspecs)
    for source in sources:
        _register(manager, source)
    owners: dict[str, str] = {}  # of families that plugins add
    for source in sources:
        _add_family_hooks(manager, source, owners)
    for source in sources:
        _check_hooks(manager, source)


def call_one(manager: pluggy.PluginManager, name: str, hook: str, **arguments: Any) -> list[Any]:
    """The results of one plugin's hook. Raises PluginError with its name, or its ConfigError."""
    plugin = manager.get_plugin(name)
    others = [other for _, other in manager.list_name_plugin() if other is not plugin]
    try:
        results: list[Any] = manager.subset_hook_caller(hook, others)(**arguments)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {name!r} failed in {hook}: {type(error).__name__}: {error}"
        ) from error
    return results


def _register(manager: pluggy.PluginManager, source: Source) -> None:
    label = f"plugin {source.name!r} ({source.distribution} {source.version})"
    way_out = f"fix or uninstall it, or start without it: plugins.blocklist=[{source.name}]"
    try:
        plugin = source.load()
    except (Exception, SystemExit) as error:  # whatever a third party's import raises
        raise PluginError(
            f"{label} failed to load: {type(error).__name__}: {error}\n{way_out}"
        ) from error
    try:
        manager.register(plugin, source.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{label} breaks the plugin contract: {error}\n{way_out}") from error
    if not manager.get_hookcallers(plugin):
        raise PluginError(
            f"{label} implements no hook; mark its functions with "
            f"core.plugin.hookspecs.hookimpl\n{way_out}"
        )


def _add_family_hooks(
    manager: pluggy.PluginManager, source: Source, owners: dict[str, str]
) -> None:
    """The hooks by which others register in the families that a plugin adds."""
    for families in call_one(manager, source.name, "register_family"):
        for family in families:
            require_name(source.name, "family", family.name)
            if HOOK_PREFIX + family.name in vars(hookspecs) or family.name in owners:
                raise PluginError(
                    f"plugin {source.name!r} adds the family {family.name!r}, which "
                    f"{owners.get(family.name, 'nodeweave')!r} has already; give it another name, "
                    f"or block one: plugins.blocklist=[{source.name}]"
                )
            owners[family.name] = source.name
            added = types.ModuleType(family.name)
            setattr(added, HOOK_PREFIX + family.name, hookspec(_registrations()))
            try:
                manager.add_hookspecs(added)
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(
                    f"plugin {source.name!r} adds the family {family.name!r}: {error}"
                ) from error


def _registrations() -> Callable[[], Sequence[Registration]]:
    def hook() -> Sequence[Registration]:
        raise AssertionError("a specification is never called")

    return hook


def _check_hooks(manager: pluggy.PluginManager, source: Source) -> None:
    known = {name for name, hook in vars(manager.hook).items() if hook.has_spec()}
    for hook in manager.get_hookcallers(manager.get_plugin(source.name)) or []:
        if hook.name not in known:
            raise PluginError(
                f"plugin {source.name!r} ({source.distribution} {source.version}) implements an "
                f"unknown hook {hook.name!r}{did_you_mean(hook.name, known)}\n"
                f"hooks: {', '.join(sorted(known))}"
            )
