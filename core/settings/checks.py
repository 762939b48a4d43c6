"""Checks of values that a user sets, with errors that name the key and what is allowed.

Knows no config class.
"""

import re
from collections.abc import Iterable, Sequence

from core.errors import ConfigError

ANY_ORIGIN = "*"


def require_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is not known; allowed: {', '.join(allowed)}")


def require_range(key: str, value: float | None, least: float, most: float | None = None) -> None:
    """Raise ConfigError unless `least <= value <= most`; None (not set) passes."""
    if value is None:
        return
    if value != value or value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{key}={value} is out of range; allowed: {allowed}")


def require_members(key: str, names: Iterable[str], list_key: str, members: Sequence[str]) -> None:
    """Raise ConfigError unless a list names nothing twice, and all that `key` has something for."""
    if len(set(members)) < len(members):
        raise ConfigError(f"{list_key}=[{','.join(members)}] names one twice")
    for name in names:
        if name not in members:
            raise ConfigError(
                f"{key}.{name} is set, but {list_key}=[{','.join(members)}] does not name it; "
                f"set {list_key}=[{','.join([*members, name])}]"
            )


def require_origin(key: str, value: str) -> None:
    """Raise ConfigError unless `value` has the form of an Origin header, or is "*"."""
    if value != ANY_ORIGIN and not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+", value):
        raise ConfigError(
            f"{key} holds {value!r}, which is no origin; allowed: scheme://host or "
            f"scheme://host:port without a path, as http://localhost:3000, or {ANY_ORIGIN!r}"
        )
