"""Rotary position embeddings as a config.json describes them. Knows nothing of torch.

Reads both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5; where
a config has both, `rope_scaling` is the one that transformers reads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ModelError, ModelKeyError
from core.layers.basic.config_reader import MAX_POSITIONS, is_positive, shown

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0  # of configs that don't say it
# Of the numbers below; published ones lie between 0.1 and 1e9. Beyond, angles overflow.
LEAST, MOST = 1e-9, 1e12
# What an object of each kind may hold beside what every one does.
_KEYS_OF_ALL = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
            "beta_slow", "mscale", "mscale_all_dim", "truncate",
        }
    ),
    "longrope": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "short_factor",
            "long_factor",
        }
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles. Fields beyond `fraction` matter to some `kind`s only."""

    kind: str = "default"
    theta: float = DEFAULT_THETA
    fraction: float = 1.0  # of a head's values, the first ones, that turn
    factor: float = 1.0  # of context extension: linear, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn: tokens before extension
    attention_factor: float | None = None  # of cos and sin: yarn (None: derived), longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    frequency_factors: tuple[float, ...] = ()  # longrope: divide each frequency


def parse_rope(hf_config: Mapping[str, Any]) -> RopeSpec:
    """Read a config's rotary embedding. Raises ModelError for what is not supported."""
    key, raw = _rope_object(hf_config)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ModelKeyError(
            key, f".rope_type={shown(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    for name, value in raw.items():
        if isinstance(value, Mapping):
            raise ModelKeyError(
                key, f".{name}={shown(value)} (by type of layer) is not supported; allowed: numbers"
            )
    fields = _Fields(key, kind, raw, hf_config)
    return replace(_parse_angles(fields, kind, raw), fraction=_fraction(hf_config, raw))


def _fraction(hf_config: Mapping[str, Any], raw: Mapping[str, Any]) -> float:
    """`partial_rotary_factor`: the one in the object counts before the one beside it."""
    name = "partial_rotary_factor"
    value = raw.get(name, hf_config.get(name))
    if value is None:
        return 1.0
    if not is_positive(value) or value > 1:
        raise ModelKeyError(
            name, f"={shown(value)} is not supported; allowed: a number above 0, at most 1"
        )
    return float(value)


def _parse_angles(fields: "_Fields", kind: str, raw: Mapping[str, Any]) -> RopeSpec:
    theta = fields.theta()
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=fields.number("factor"))
    if kind == "longrope":
        return _parse_longrope(fields, theta, raw)
    original = fields.original()
    if kind == "yarn" and raw.get("factor") is None:
        factor = fields.stretch(original)
    else:
        factor = fields.number("factor")
    common = RopeSpec(kind=kind, theta=theta, factor=factor, original_max_positions=original)
    return _with_llama3(common, fields) if kind == "llama3" else _with_yarn(common, fields)


def extended_positions(rope: RopeSpec, max_positions: int) -> int:
    """Tokens that a model's positions reach, where config.json says `max_positions`: model cards
    tell users to add YaRN and leave that number, as vLLM and SGLang reckon with."""
    if rope.kind == "yarn":
        return max(max_positions, _within_size(rope.original_max_positions * rope.factor))
    if rope.kind == "linear":
        return max(max_positions, _within_size(max_positions * rope.factor))
    return max_positions


def rope_warnings(hf_config: Mapping[str, Any]) -> list[str]:
    """What a user should know of an object that `parse_rope` reads."""
    key, raw = _rope_object(hf_config)
    found = []
    other = hf_config.get("rope_parameters")
    if key == "rope_scaling" and other and other != raw:
        found.append(
            "config.json has both rope_scaling and rope_parameters, and they differ; rope_scaling "
            "counts, as in transformers: remove the other"
        )
    kind = raw.get("rope_type", raw.get("type", "default"))
    unknown = sorted(
        name
        for name, value in raw.items()
        if value is not None and name not in _KEYS_OF_ALL | _KEYS[kind]
    )
    if unknown:
        found.append(
            f"config.json: {key} has keys that rope_type={kind!r} doesn't have, which are ignored: "
            + ", ".join(shown(name)[1:-1] for name in unknown[:10])
        )
    return found


def _rope_object(hf_config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    raw = hf_config.get(key) or {}
    if not isinstance(raw, Mapping):
        raise ModelKeyError(key, f"={shown(raw)} must be an object or null")
    return key, raw


def _within_size(positions: float) -> int:
    return int(min(positions, MAX_POSITIONS))


class _Fields:
    """Numbers of one rope object, with errors that name it."""

    def __init__(
        self, key: str, kind: str, raw: Mapping[str, Any], hf_config: Mapping[str, Any]
    ) -> None:
        self._key, self._kind, self._raw, self._config = key, kind, raw, hf_config

    def error(self, name: str, rest: str) -> ModelError:
        return ModelKeyError(self._key, f".{name}{rest}")

    def checked(self, name: str, value: Any) -> float:
        if not is_positive(value):
            raise self.error(
                name,
                f"={shown(value)} is needed by rope_type={self._kind!r}; allowed: a number above 0",
            )
        if not LEAST <= value <= MOST:
            raise self.error(
                name, f"={shown(value)} is not supported; allowed: from {LEAST:g} to {MOST:g}"
            )
        return float(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name)
        return self.checked(name, default if value is None else value)

    def optional(self, name: str) -> float | None:
        value = self._raw.get(name)
        return None if value is None else self.checked(name, value)

    def weight(self, name: str) -> float | None:
        """A number that counts as absent where it is 0."""
        return None if self._raw.get(name) == 0 else self.optional(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._raw.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, f"={shown(value)} is not supported; allowed: true or false")
        return bool(value)

    def original(self) -> int:
        """Tokens before the context was extended. A key beside the object counts before the one
        in it, as in transformers."""
        name = "original_max_position_embeddings"
        value = self._config.get(name)
        if value is None:
            value = self._raw.get(name)
        if value is None:
            value = self._config.get("max_position_embeddings")
        number = self.checked(name, value)
        if not 1 < number <= MAX_POSITIONS:
            raise self.error(
                name, f"={shown(value)} is not supported; allowed: from 2 to {MAX_POSITIONS}"
            )
        return int(number)

    def theta(self) -> float:
        """Beside the object where it has none; transformers' default where neither has one."""
        value = self._raw.get("rope_theta")
        if value is None:
            value = self._config.get("rope_theta")
        return self.checked("rope_theta", DEFAULT_THETA if value is None else value)

    def stretch(self, original: int) -> float:
        """How much longer than `original` the context is, where no factor says it."""
        key = "max_position_embeddings"
        return self.checked("factor", self._config.get(key, original)) / original


def _with_llama3(common: RopeSpec, fields: _Fields) -> RopeSpec:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise fields.error(
            "low_freq_factor", f"={low} of rope_type='llama3' must be below high_freq_factor={high}"
        )
    return replace(common, low_freq_factor=low, high_freq_factor=high)


def _with_yarn(common: RopeSpec, fields: _Fields) -> RopeSpec:
    if common.theta == 1:
        raise fields.error("rope_theta", "=1 is not supported with rope_type='yarn'")
    return replace(
        common,
        attention_factor=fields.optional("attention_factor"),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.weight("mscale"),
        mscale_all_dim=fields.weight("mscale_all_dim"),
        truncate=fields.flag("truncate", True),
    )


def _parse_longrope(fields: _Fields, theta: float, raw: Mapping[str, Any]) -> RopeSpec:
    """Frequency factors that do not depend on the length, as GGUF files carry them."""
    short, long = raw.get("short_factor"), raw.get("long_factor")
    if not isinstance(short, list) or short != long:
        raise fields.error(
            "short_factor",
            ": rope_type='longrope' is supported only where short_factor equals long_factor "
            "(frequencies that do not change with the length)",
        )
    factors = tuple(fields.checked("short_factor", factor) for factor in short)
    attention_factor = fields.optional("attention_factor")
    if attention_factor is None:
        original = fields.original()
        factor = fields.optional("factor") or fields.stretch(original)
        attention_factor = longrope_attention_factor(factor, original)
    return RopeSpec(
        kind="longrope", theta=theta, attention_factor=attention_factor, frequency_factors=factors
    )


def longrope_attention_factor(factor: float, original: int) -> float:
    """The factor on cos and sin of a context that was `original` tokens and became `factor` times
    as long. Source: LongRoPE, arXiv 2402.13753, as transformers computes it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
