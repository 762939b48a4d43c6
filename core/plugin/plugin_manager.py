"""Loads plugins once, at start-up, and turns their hooks into plain tables.

Knows nothing of what a backend does, imports no plugin by name (the built-in ones are strings)
and never imports torch: a factory's module is imported when that factory is chosen.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pluggy

from core.errors import ConfigError, PlanError, PluginError
from core.interfaces.worker import WorkerInfo
from core.plugin import hookspecs, lifespans
from core.plugin.commands import COMMANDS, Command
from core.plugin.families import Chosen, Family, choices, families_of
from core.plugin.hookspecs import PROJECT, Registration
from core.plugin.lifespans import Lifespan, require_manager
from core.plugin.sources import (
    BUILTIN_PLUGINS,
    Source,
    call_one,
    find_sources,
    module_of,
    register_all,
    require_name,
)
from core.settings.config import AppConfig, PluginChoice
from core.settings.schema import build, did_you_mean

AUTO = "auto"  # in the families with a `default_backend`: chosen once the device is known


@dataclass(frozen=True, slots=True)
class Entry:
    """A registration and the plugin it came from."""

    plugin: str
    registration: Registration


class PluginTable:
    """The registrations of one family by name. Nothing is added after start-up."""

    __slots__ = ("_entries", "_key", "family")

    def __init__(self, family: str, key: str, entries: Mapping[str, Entry]) -> None:
        """`key`: the config key of the family's choices, for messages."""
        self.family = family
        self._key = key
        self._entries = dict(entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Registration:
        """The registration of `name`. Raises PluginError naming those there are."""
        return self._entry(name).registration

    def plugin_of(self, name: str) -> str:
        """The plugin that registered `name`."""
        return self._entry(name).plugin

    def options(
        self, choice: PluginChoice, key: str | None = None, *, options_key: str | None = None
    ) -> Any:
        """The typed options of a choice; `key` is the config key of the choice, for messages, and
        `options_key` that of its options, where that is not `<key>.options`."""
        options_key = options_key or f"{key or self._key}.options"
        return build(self.get(choice.name).config, choice.options, options_key)

    def create(
        self,
        choice: PluginChoice,
        *arguments: Any,
        key: str | None = None,
        options_key: str | None = None,
    ) -> Any:
        """Call the chosen factory with its typed options and `arguments` (see the hook)."""
        options = self.options(choice, key, options_key=options_key)
        factory = self._factory(choice.name)
        try:
            return factory(options, *arguments)
        except SystemExit as error:  # it would end the process without a word
            raise PluginError(
                f"{self.family} plugin {choice.name!r} (from {self.plugin_of(choice.name)}) "
                f"can't be built: it called sys.exit({error.code!r})"
            ) from error

    def create_all(self, *arguments: Any) -> dict[str, Any]:
        """What every factory of a family makes of its default options and `arguments`, by name."""
        return {name: self.create(PluginChoice(name=name), *arguments) for name in self}

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise PluginError(_unknown(self.family, name, sorted(self._entries)))
        return self._entries[name]

    def _factory(self, name: str) -> Callable[..., Any]:
        entry = self._entry(name)
        factory = entry.registration.factory
        if callable(factory):
            return factory
        module_name, _, attribute = factory.partition(":")
        try:
            loaded = getattr(importlib.import_module(module_name), attribute)
        except (Exception, SystemExit) as error:  # whatever a third party's import raises
            raise PluginError(
                f"{self.family} plugin {name!r} (from {entry.plugin}) can't be used here: "
                f"{factory} failed to import: {type(error).__name__}: {error}\n"
                f"install what it needs, or choose another: {', '.join(sorted(self._entries))}"
            ) from error
        assert callable(loaded), f"{factory} is not callable"
        return loaded  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Registered:
    """A name that a plugin registered."""

    family: str
    registration: Registration
    overridden_by: str | None  # the plugin whose registration of that name is used instead


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPlugin:
    """What a loaded plugin is and does."""

    name: str  # as plugins.blocklist and error messages have it
    distribution: str
    version: str
    module: str  # or the class of an object
    hooks: tuple[str, ...]  # that it implements, in the order of core.plugin.hookspecs
    registered: tuple[Registered, ...]


class PluginManager:
    """Every loaded plugin. Built by `load`; read-only afterwards."""

    def __init__(self, manager: pluggy.PluginManager, sources: Mapping[str, "Source"]) -> None:
        self._manager = manager
        self._sources = dict(sources)
        self.sections = self._collect_sections()
        self.commands = self._collect_commands()
        self._families = self._collect_families()
        self._tables = {family: self._collect(family) for family in self._families}

    @classmethod
    def load(
        cls,
        blocklist: Iterable[str] = (),
        *,
        builtins: Sequence[str] = BUILTIN_PLUGINS,
        objects: Mapping[str, object] | None = None,
    ) -> "PluginManager":
        """Load the built-in plugins, then those of the entry-point group, but not `blocklist`.

        `objects` are further plugins by name, for embedding and tests. Raises PluginError for a
        plugin that fails to load or breaks the contract; nothing is skipped silently.
        """
        manager = pluggy.PluginManager(PROJECT)
        sources = find_sources(builtins, objects or {})
        blocked = set(blocklist)
        for name in sorted(blocked - set(sources)):
            raise PluginError(
                f"plugins.blocklist names {name!r}, which is not there"
                f"{did_you_mean(name, sources)}\nplugins: {', '.join(sources)}"
            )
        loaded = {name: source for name, source in sources.items() if name not in blocked}
        register_all(manager, list(loaded.values()))
        return cls(manager, loaded)

    def table(self, family: str) -> PluginTable:
        """The registrations of one family, ours or a plugin's."""
        return self._tables[family]

    def options(self, family: str, choice: PluginChoice, key_prefix: str) -> Any:
        """The typed options of a choice that stands under `key_prefix` in the config."""
        return self.table(family).options(choice, key_prefix)

    def check_choices(self, config: AppConfig) -> None:
        """Raise unless every plugin the config names is there and takes the options given."""
        for chosen in choices(config, self.sections):
            families, key, choice, options_key, takes_auto = chosen
            tables = [self.table(family) for family in families]
            if choice.name != AUTO or not takes_auto:
                _check_options(tables, chosen)
            elif choice.options:
                names = sorted({name for table in tables for name in table})
                raise ConfigError(
                    f"{options_key} are given but {key}.name is auto; options belong to one "
                    f"{families[0]} plugin, so choose it: {', '.join(names)}"
                )

    def require_serving(self, config: AppConfig) -> None:
        """Raise ConfigError where the config names a plugin whose results mean nothing."""
        for families, key, choice, *_ in choices(config, self.sections):
            for family in families:
                table = self.table(family)
                if choice.name in table and not table.get(choice.name).for_serving:
                    raise ConfigError(
                        f"{key}={choice.name} is for timing one rank alone: its answers would mean "
                        f"nothing, so it can't serve; set {key}=auto, or use it with "
                        "`python -m benchmarks.emulated_rank`"
                    )

    def check_plan(self, config: AppConfig) -> list[str]:
        """What every plugin finds wrong with a configuration, settled or not, in one list."""
        found = self._call_each("check_plan", config=config, plugins=self)
        return [problem for _, problems in found for problem in problems]

    def worker_lifespans(self, config: AppConfig, worker: WorkerInfo) -> list[Lifespan]:
        """What plugins run beside a rank, in the order they were loaded; nothing is entered.
        Raises PluginError for what is no context manager."""
        found = self._call_each(lifespans.HOOK, config=config, worker=worker)
        return [require_manager(plugin, made) for plugin, made in found]

    def plan_problems(self, config: AppConfig) -> list[str]:
        """What the chosen parallelism plan and every plugin find wrong, in one list, before the
        model's files are looked for. Raises what else the plan's factory raises."""
        parallel = config.parallel
        choice = PluginChoice(name=parallel.plan, options=parallel.options)
        problems: list[str] = []
        try:
            self.table("parallel_plan").create(choice, parallel)
        except PlanError as error:
            problems += error.problems
        return [*problems, *self.check_plan(config)]

    def default_backend(self, family: str, device: str, config: AppConfig) -> str:
        """What `auto` means in a family (see the hook) on a device. Raises ConfigError where no
        plugin knows."""
        name = self._manager.hook.default_backend(family=family, device=device, config=config)
        table = self.table(family.partition(".")[0])
        if name is None:
            raise ConfigError(
                f"no plugin knows the best {family} backend for device {device!r}; "
                f"choose one: {', '.join(sorted(table))}"
            )
        table.get(name)
        return str(name)

    def config_searchpath(self) -> list[str]:
        """Where plugins keep Hydra configs of their own, in the order they were loaded."""
        paths: list[str] = []
        for plugin, found in self._call_each("config_searchpath"):
            for path in found:
                if not path.startswith(("pkg://", "file://")):
                    raise PluginError(
                        f"plugin {plugin!r} returned {path!r} from config_searchpath; it must "
                        "begin with pkg:// (a package) or file:// (a folder)"
                    )
                paths.append(path)
        return paths

    def fingerprint(self) -> dict[str, str]:
        """The version of every loaded plugin's distribution; nodes compare these."""
        return {name: source.version for name, source in self._sources.items()}

    def loaded(self) -> list[LoadedPlugin]:
        """Every loaded plugin, in the order they were loaded."""
        found: dict[str, list[Registered]] = {name: [] for name in self._sources}
        for family, where in self._families.items():
            for name, registrations in self._call_each(where.hook):
                for registration in registrations:
                    used = self.table(family).plugin_of(registration.name)
                    by = None if used == name else used
                    found[name].append(Registered(family, registration, by))
        return [
            LoadedPlugin(
                name=name,
                distribution=source.distribution,
                version=source.version,
                module=module_of(self._manager.get_plugin(name)),
                hooks=self._hooks_of(name),
                registered=tuple(found[name]),
            )
            for name, source in self._sources.items()
        ]

    def _hooks_of(self, name: str) -> tuple[str, ...]:
        callers = self._manager.get_hookcallers(self._manager.get_plugin(name)) or []
        implemented = {caller.name for caller in callers}
        hooks = [*vars(hookspecs), *(family.hook for family in self._families.values())]
        return tuple(dict.fromkeys(hook for hook in hooks if hook in implemented))

    def _collect_families(self) -> dict[str, Family]:
        added = (made.name for _, made in self._each_made("register_family"))
        return families_of(added, self.sections)

    def _collect_sections(self) -> dict[str, type]:
        found = list(self._each_made("register_config"))
        _require_distinct(
            "config section",
            [(plugin, made.name) for plugin, made in found],
            [field.name for field in fields(AppConfig)],
        )
        for plugin, made in found:
            try:
                build(made.config, {}, made.name)
            except (ConfigError, TypeError) as error:
                raise PluginError(
                    f"plugin {plugin!r} failed in register_config: the section {made.name!r} needs "
                    f"a dataclass whose fields all have defaults: {error}"
                ) from error
        return {made.name: made.config for _, made in found}

    def _collect_commands(self) -> dict[str, Command]:
        found = list(self._each_made("register_commands"))
        _require_distinct("command", [(plugin, made.name) for plugin, made in found], COMMANDS)
        return {made.name: made for _, made in found}

    def _each_made(self, hook: str) -> Iterator[tuple[str, Any]]:
        for plugin, made in self._call_each(hook):
            for each in made:
                yield plugin, each

    def _collect(self, family: str) -> PluginTable:
        plain: dict[str, Entry] = {}
        overriding: dict[str, Entry] = {}
        for plugin, registrations in self._call_each(self._families[family].hook):
            for registration in registrations:
                seen = overriding if registration.override else plain
                if registration.name in seen:
                    again = "overridden" if registration.override else "registered"
                    raise PluginError(
                        f"{family} plugin {registration.name!r} is {again} twice: by "
                        f"{seen[registration.name].plugin!r} and by {plugin!r}; block one of them "
                        "with plugins.blocklist=[...], or let one alone set override=True"
                    )
                seen[registration.name] = Entry(plugin, registration)
        return PluginTable(family, self._families[family].key, plain | overriding)

    def _call_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of a hook, plugin by plugin as loaded, so that errors have a name."""
        for name, _ in self._manager.list_name_plugin():
            for result in call_one(self._manager, name, hook, **arguments):
                yield name, result


def _require_distinct(what: str, found: Sequence[tuple[str, str]], taken: Iterable[str]) -> None:
    """Raise PluginError where two plugins add one name, or one that is there already."""
    owners = dict.fromkeys(taken, "nodeweave")
    for plugin, name in found:
        require_name(plugin, what, name)
        if name in owners:
            raise PluginError(
                f"plugin {plugin!r} adds the {what} {name!r}, which {owners[name]!r} has already; "
                f"give it another name, or block one: plugins.blocklist=[{plugin}]"
            )
        owners[name] = plugin


def _check_options(tables: Sequence[PluginTable], chosen: Chosen) -> None:
    """Raise unless one of the tables has the chosen plugin and it takes the options."""
    _, key, choice, options_key, _ = chosen
    having = [table for table in tables if choice.name in table]
    if not having:
        names = sorted({name for table in tables for name in table})
        raise PluginError(f"{key}={choice.name}: {_unknown(tables[0].family, choice.name, names)}")
    refusals = []
    for table in having:
        try:
            table.options(choice, options_key=options_key)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(having):
        raise refusals[0]


def _unknown(family: str, name: str, names: Sequence[str]) -> str:
    return (
        f"there is no {family} plugin {name!r}{did_you_mean(name, names)}\n"
        f"{family} plugins: {', '.join(names) or 'none'}"
    )
