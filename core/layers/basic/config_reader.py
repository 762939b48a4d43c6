"""Typed reads of a config.json, with errors that name key, value and what is allowed.

Knows nothing of any model family, nor of torch.
"""

import sys
from collections.abc import Mapping
from typing import Any

from core.errors import ModelKeyError

MAX_SIZE = 1 << 31  # no dimension of a model comes near; sizes beyond would exhaust memory
MAX_LAYERS = 10_000  # layers are walked one by one, and so are experts
MAX_EXPERTS = 100_000
MAX_POSITIONS = 1 << 24  # the table of rotary angles has a row for each
_MAX_SHOWN = 100  # characters of a value in an error


class ConfigReader:
    """The contents of a config.json. A missing key or null means the default, where there is one.
    Every method raises ModelError for values that are not what it reads."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        self._config = hf_config

    def size(self, key: str, default: int | None = None, *, at_most: int = MAX_SIZE - 1) -> int:
        """A whole number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, value, "a whole number above 0")
        if value > at_most:
            raise self.error(key, value, f"a whole number up to {at_most}")
        return value

    def count(self, key: str, default: int | None = None, *, at_most: int = MAX_SIZE - 1) -> int:
        """A whole number, 0 or more."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, value, "a whole number, 0 or more")
        if value > at_most:
            raise self.error(key, value, f"a whole number up to {at_most}")
        return value

    def num_layers(self) -> int:
        """`num_hidden_layers`."""
        return self.size("num_hidden_layers", at_most=MAX_LAYERS)

    def num_experts(self, key: str) -> int:
        """Routed experts of a layer."""
        return self.size(key, at_most=MAX_EXPERTS)

    def optional_size(self, key: str) -> int | None:
        """A whole number above 0; None where the key is missing or null."""
        return None if self._config.get(key) is None else self.size(key)

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self._value(key, default)
        if not is_positive(value):
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
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, value, ", ".join(allowed))
        return value

    def indices(self, key: str, below: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to `below` - 1; empty where the key is missing."""
        value = self._value(key, ())
        if not isinstance(value, list | tuple) or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < below for i in value
        ):
            raise self.error(key, value, f"a list of whole numbers from 0 to {below - 1}")
        return tuple(value)

    def error(self, key: str, value: object, allowed: str) -> ModelKeyError:
        """The error of a value that is not supported."""
        if value is None and key not in self._config:
            return ModelKeyError(key, f" is missing; needed: {allowed}")
        return ModelKeyError(key, f"={shown(value)} is not supported; allowed: {allowed}")

    def _value(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        return default if value is None else value


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0, small enough to be a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def shown(value: object) -> str:
    """A value of a stranger's file, as errors show it."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
