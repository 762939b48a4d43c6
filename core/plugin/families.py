"""Which families of plugins there are, and what a configuration chooses of each.

Ours are the hooks of `core.plugin.hookspecs` that return registrations; a plugin adds others.
"""

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from core.plugin import hookspecs
from core.plugin.hookspecs import HOOK_PREFIX, Registration
from core.settings.choice import ChoiceField, PluginChoice, choice_fields
from core.settings.config import AppConfig, section

_OURS = sorted(choice_fields(AppConfig), key=lambda each: each.is_text)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of plugin: the hook that registers it and the config key that holds its choice."""

    hook: str
    key: str


def families_of(added: Iterable[str], sections: Mapping[str, type]) -> dict[str, Family]:
    """Our families and those `added`, chosen by our keys and those of plugins' own sections."""
    marked = [*_OURS, *(each for name, cls in sections.items() for each in _fields(name, cls))]
    return {
        family: Family(HOOK_PREFIX + family, _key(family, marked)) for family in [*_NAMES, *added]
    }


class Chosen(NamedTuple):
    """One choice of a configuration, of any of these families; `key` and `options_key` are where
    its name and its options stand."""

    families: tuple[str, ...]
    key: str
    choice: PluginChoice
    options_key: str
    takes_auto: bool


def choices(config: AppConfig, sections: Mapping[str, type]) -> list[Chosen]:
    """Everything a configuration chooses; what belongs to a phase or an axis first."""
    found = [each for field in _OURS for each in _chosen(field, config)]
    for name, cls in sections.items():
        own: object = section(config, name, cls)
        whole = SimpleNamespace(**{name: own})  # what the paths of its fields begin at
        found += [each for field in _fields(name, cls) for each in _chosen(field, whole)]
    return found


def _chosen(field: ChoiceField, config: object) -> list[Chosen]:
    return [
        Chosen(field.families, field.key, *each, field.takes_auto) for each in field.all_of(config)
    ]


def _fields(name: str, cls: type) -> list[ChoiceField]:
    return choice_fields(cls, (name,))


def _key(family: str, marked: Sequence[ChoiceField]) -> str:
    """The one key that chooses of a family; its group where several do; else its own name."""
    found = [each for each in marked if family in each.families]
    return found[0].key if len(found) == 1 else found[0].group if found else family


def _our_names() -> list[str]:
    return [
        name.removeprefix(HOOK_PREFIX)
        for name, hook in vars(hookspecs).items()
        if name.startswith(HOOK_PREFIX)
        and typing.get_type_hints(hook)["return"] == Sequence[Registration]
    ]


_NAMES = _our_names()
FAMILIES = families_of((), {})
