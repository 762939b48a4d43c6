"""Typed reads of a config.json, with errors that name key, value and what is allowed.

Knows nothing of any model family, nor of torch.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import ModelError


class ConfigReader:
    """The contents of a config.json. A missing key or null means the default, where there is one.
    Every method raises ModelError for values that are not what it reads."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        self._config = hf_config

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, value, "a whole number above 0")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, 0 or more."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, value, "a whole number, 0 or more")
        return value

    def optional_size(self, key: str) -> int | None:
        """A whole number above 0; None where the key is missing or null."""
        return None if self._config.get(key) is None else self.size(key)

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of `allowed`."""
        value = self._value(key, default)
        if value not in allowed:
            raise self.error(key, value, ", ".join(allowed))
        return str(value)

    def indices(self, key: str, below: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to `below` - 1; empty where the key is missing."""
        value = self._value(key, ())
        if not isinstance(value, list | tuple) or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < below for i in value
        ):
            raise self.error(key, value, f"a list of whole numbers from 0 to {below - 1}")
        return tuple(value)

    def error(self, key: str, value: object, allowed: str) -> ModelError:
        """The error of a value that is not supported."""
        if value is None and key not in self._config:
            return ModelError(f"config.json: {key} is missing; needed: {allowed}")
        return ModelError(f"config.json: {key}={value!r} is not supported; allowed: {allowed}")

    def _value(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        return default if value is None else value
