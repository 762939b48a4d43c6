"""Config fields that choose a plugin: marked in their annotations, and found by those.

A field that chooses one needs a mark where it stands and a default in conf/config.yaml; what is
checked, spread over phases and offered on the command line follows from it. Knows no config class.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class PluginChoice:
    """Which plugin of a family is used and its options, checked against the plugin's own
    config dataclass when the plugin table is read (`core.plugin.plugin_manager`)."""

    name: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chooses:
    """Marks a field that names a plugin: `Annotated[PluginChoice, Chooses("comm")]`, or text, whose
    options are what the field `options` beside it holds, where there is one, or a list of texts,
    where that field holds the options of each by name. `options` names another field beside it,
    where a section chooses more than one thing.

    Of several families the one that counts is known once the model is; until then any will do.
    """

    family: str
    or_family: str | None = None
    options: str = "options"

    @property
    def families(self) -> tuple[str, ...]:
        return (self.family,) if self.or_family is None else (self.family, self.or_family)


@dataclass(frozen=True, slots=True)
class ChoiceField:
    """One field that chooses a plugin."""

    families: tuple[str, ...]
    group: str  # the config group that it stands in
    path: tuple[str, ...]  # of attributes, from the whole configuration
    is_text: bool  # the field holds the name alone
    options: str | None  # of text: the field beside it that holds the plugin's
    takes_auto: bool  # it may say "auto", which is chosen once the device or the model is known
    is_list: bool = False  # it holds several names, and `options` beside it those of each by name

    @property
    def key(self) -> str:
        """As messages have it: a group of one choice is that choice."""
        return ".".join(self.path[:-1] if self.is_group else self.path)

    @property
    def is_group(self) -> bool:
        """Whether its group is one choice with its options, and more settings beside."""
        return self.is_text and self.options == "options"

    @property
    def options_key(self) -> str:
        if self.options is None:
            return f"{self.key}.options"
        return ".".join((*self.path[:-1], self.options))

    def of(self, config: Any) -> PluginChoice:
        """What a configuration chooses by a field of one choice."""
        section, value = self._held(config)
        if isinstance(value, PluginChoice):
            return value
        options = getattr(section, self.options) if self.options else {}
        return PluginChoice(name=value, options=options)

    def all_of(self, config: Any) -> list[tuple[PluginChoice, str]]:
        """(choice, key of its options) of everything that a configuration chooses by it."""
        if not self.is_list:
            return [(self.of(config), self.options_key)]
        section, names = self._held(config)
        options, group = section.options, ".".join(self.path[:-1])
        return [
            (
                PluginChoice(name=name, options=options.get(name, {})),
                f"{group}.options.{name}",
            )
            for name in names
        ]

    def _held(self, config: Any) -> tuple[Any, Any]:
        """The section that the field stands in, and its value."""
        *sections, last = self.path
        section = config
        for name in sections:
            section = getattr(section, name)
        return section, getattr(section, last)


def choice_fields(cls: type, path: tuple[str, ...] = ()) -> list[ChoiceField]:
    """Every marked field of a config dataclass, sections opened, in the order written."""
    found: list[ChoiceField] = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for each in dataclasses.fields(cls):
        hint, here = hints[each.name], (*path, each.name)
        marks = [mark for mark in typing.get_args(hint)[1:] if isinstance(mark, Chooses)]
        if marks:
            kind = typing.get_args(hint)[0]
            is_list = typing.get_origin(kind) is list
            is_text = kind is str
            options = (
                marks[0].options if marks[0].options in hints and (is_text or is_list) else None
            )
            takes_auto = not is_list and (not is_text or each.default == "auto")
            found.append(
                ChoiceField(marks[0].families, here[0], here, is_text, options, takes_auto, is_list)
            )
        elif dataclasses.is_dataclass(hint):
            found += choice_fields(typing.cast(type, hint), here)
    return found


def spread_groups(cls: type) -> dict[str, list[str]]:
    """Groups with a choice for each phase or axis, and those; the bare name of the group on the
    command line means all of them."""
    groups: dict[str, list[str]] = {}
    for found in choice_fields(cls):
        if not (found.is_text or found.is_list):
            groups.setdefault(found.group, []).append(".".join(found.path[1:]))
    return groups


def single_groups(cls: type) -> list[str]:
    """Groups that are one choice with its options, and more settings beside."""
    return [each.group for each in choice_fields(cls) if each.is_group]
