"""Plain values into typed dataclasses and back. Knows nothing of Hydra or of any config class.

Both the configuration itself and every plugin's options pass through `build`, so that an unknown
key or a wrong type is reported in one way: the full dotted key, the value, and what is allowed.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from core.errors import ConfigError

T = TypeVar("T")
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def build(cls: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """An instance of a dataclass from nested plain values.

    `key` is the dotted key of `values` itself, for messages. Raises ConfigError for an unknown
    or missing key and for a value of the wrong type; the class's own checks run afterwards.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            allowed = ", ".join(fields) or "none"
            raise ConfigError(
                f"unknown key {_join(key, name)!r}{did_you_mean(str(name), fields)}\n"
                f"keys of {key or 'the configuration'}: {allowed}"
            )
        arguments[name] = convert(hints[name], value, _join(key, name))
    for name, field in fields.items():
        if name not in arguments and not _has_default(field):
            expected = type_name(hints[name])
            raise ConfigError(f"{_join(key, name)} is not set; it needs {expected}")
    try:
        return cls(**arguments)
    except ValueError as error:  # a plugin's own check of its options
        raise ConfigError(f"{key}: {error}") from error


def convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or ConfigError. Only int to float is converted silently."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, arguments, value, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong_type(hint, value, key)
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, key)
        return build(typing.cast(type[Any], hint), value, key)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong_type(hint, value, key)
        return origin(convert(arguments[0], x, f"{key}[{i}]") for i, x in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, key)
        return {str(k): convert(arguments[1], v, _join(key, str(k))) for k, v in value.items()}
    assert hint in _SCALARS, f"{key}: config fields of type {hint} are not supported"
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _wrong_type(hint, value, key)
    return value


def type_name(hint: Any) -> str:
    """A type in the words of error messages and of docs/configuration.md."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else type_name(a) for a in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if dataclasses.is_dataclass(hint):
        names = ", ".join(f.name for f in dataclasses.fields(hint))
        return f"a section with the keys {names}"
    if origin in (list, tuple):
        return f"a list of {_SCALARS.get(arguments[0], type_name(arguments[0]))}"
    if origin is dict:
        return "a section"
    return "any value" if hint is Any else _SCALARS[hint]


@dataclasses.dataclass(frozen=True, slots=True)
class Knob:
    """One settable key. `default` is as YAML shows it; None where the key has no default."""

    key: str
    type: str
    default: Any
    required: bool


def is_settable(field: "dataclasses.Field[Any]") -> bool:
    """False for what is filled in while a configuration is composed."""
    return bool(field.metadata.get("settable", True))


def knobs(cls: type, key: str = "") -> list[Knob]:
    """Every key that can be set in a config dataclass, sections opened, in the order written."""
    found: list[Knob] = []
    hints = typing.get_type_hints(cls)
    for field in filter(is_settable, dataclasses.fields(cls)):
        dotted, hint = _join(key, field.name), hints[field.name]
        section = _section(hint)
        if section is not None:
            found += knobs(section, dotted)
        else:
            default = _default(field) if _has_default(field) else None
            found.append(Knob(dotted, type_name(hint), default, not _has_default(field)))
    return found


def defaults(cls: type) -> dict[str, Any]:
    """Every default of a config dataclass as nested plain values; required keys are absent."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in filter(is_settable, dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = defaults(typing.cast(type, hints[field.name]))
        elif _has_default(field):
            values[field.name] = _default(field)
    return values


def _section(hint: Any) -> type | None:
    """The dataclass in `hint` or in `hint | None`."""
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def _convert_union(hint: Any, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    candidates = [a for a in arguments if a is not types.NoneType]
    if len(candidates) == 1 and dataclasses.is_dataclass(candidates[0]):
        return convert(candidates[0], value, key)  # its own message names the inner key
    for candidate in candidates:
        try:
            return convert(candidate, value, key)
        except ConfigError:
            continue
    raise _wrong_type(hint, value, key)


def _wrong_type(hint: Any, value: Any, key: str) -> ConfigError:
    hint_text = ""
    if str in (hint, *typing.get_args(hint)) and isinstance(value, bool | int | float):
        hint_text = f"; to give text that looks like a number, quote it: '{key}=\"{value}\"'"
    shown = "null" if value is None else repr(value)
    return ConfigError(f"{key}={shown} has the wrong type; expected {type_name(hint)}{hint_text}")


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
