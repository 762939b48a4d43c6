"""Where plugins come from: the built-in ones by name, entry points of installed packages, objects.

Imports a plugin when it is registered, and says whose fault it is where that fails.
"""

import importlib
import importlib.metadata
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pluggy

from core.errors import PluginError
from core.plugin import hookspecs
from core.plugin.hookspecs import ENTRY_POINT_GROUP
from core.settings.schema import did_you_mean

BUILTIN_PLUGINS = (
    "plugins.comm",
    "plugins.moe_a2a",
    "plugins.attention.torch_ref",
    "plugins.attention.cpu",
    "plugins.attention.triton",
    "plugins.parallel",
    "plugins.models.llama",
    "plugins.models.qwen3",
    "plugins.models.qwen3_moe",
    "plugins.models.mixtral",
    "plugins.models.deepseek",
    "plugins.frontends.openai",
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


def register(manager: pluggy.PluginManager, source: Source) -> None:
    """Import one plugin and register it. Raises PluginError with its name and the cause."""
    label = f"plugin {source.name!r} ({source.distribution} {source.version})"
    way_out = f"fix or uninstall it, or start without it: plugins.blocklist=[{source.name}]"
    try:
        plugin = source.load()
    except Exception as error:  # whatever a third party's import raises
        raise PluginError(
            f"{label} failed to load: {type(error).__name__}: {error}\n{way_out}"
        ) from error
    known = {name for name in vars(hookspecs) if manager.parse_hookspec_opts(hookspecs, name)}
    try:
        manager.register(plugin, source.name)
        callers = manager.get_hookcallers(plugin) or []
        for hook in callers:
            if hook.name not in known:
                raise PluginError(
                    f"{label} implements an unknown hook {hook.name!r}"
                    f"{did_you_mean(hook.name, known)}\nhooks: {', '.join(sorted(known))}"
                )
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{label} breaks the plugin contract: {error}\n{way_out}") from error
    if not callers:
        raise PluginError(
            f"{label} implements no hook; mark its functions with "
            f"core.plugin.hookspecs.hookimpl\n{way_out}"
        )
