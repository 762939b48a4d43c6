"""Rotary position embeddings as a config.json describes them. Knows nothing of torch.

Reads both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles. Fields beyond `theta` matter to some `kind`s only."""

    kind: str = "default"
    theta: float = 10000.0
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
    key = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    raw = hf_config.get(key) or {}
    if not isinstance(raw, Mapping):
        raise ModelError(f"config.json: {key}={raw!r} must be an object or null")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"config.json: {key}.rope_type={kind!r} is not supported; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )
    fraction = raw.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0))
    if fraction not in (None, 1, 1.0):
        raise ModelError(
            f"config.json: partial_rotary_factor={fraction!r} is not supported; allowed: 1.0"
        )
    fields = _Fields(key, kind, raw)
    theta = fields.number("rope_theta", hf_config.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=fields.number("factor"))
    if kind == "longrope":
        return _parse_longrope(fields, theta, raw)
    original = raw.get("original_max_position_embeddings") or hf_config.get(
        "original_max_position_embeddings", hf_config.get("max_position_embeddings")
    )
    common = RopeSpec(
        kind=kind,
        theta=theta,
        factor=fields.number("factor"),
        original_max_positions=int(fields.checked("original_max_position_embeddings", original)),
    )
    return _with_llama3(common, fields) if kind == "llama3" else _with_yarn(common, fields, raw)


class _Fields:
    """Numbers of one rope object, with errors that name it."""

    def __init__(self, key: str, kind: str, raw: Mapping[str, Any]) -> None:
        self._key, self._kind, self._raw = key, kind, raw

    def checked(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelError(
                f"config.json: {self._key}.{name}={value!r} is needed by "
                f"rope_type={self._kind!r}; allowed: a number above 0"
            )
        return float(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name)
        return self.checked(name, default if value is None else value)

    def optional(self, name: str) -> float | None:
        value = self._raw.get(name)
        return None if not value else self.checked(name, value)


def _with_llama3(common: RopeSpec, fields: _Fields) -> RopeSpec:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise ModelError(
            f"config.json: low_freq_factor={low} of rope_type='llama3' must be below "
            f"high_freq_factor={high}"
        )
    return replace(common, low_freq_factor=low, high_freq_factor=high)


def _with_yarn(common: RopeSpec, fields: _Fields, raw: Mapping[str, Any]) -> RopeSpec:
    return replace(
        common,
        attention_factor=fields.optional("attention_factor"),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.optional("mscale"),
        mscale_all_dim=fields.optional("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
    )


def _parse_longrope(fields: _Fields, theta: float, raw: Mapping[str, Any]) -> RopeSpec:
    """Frequency factors that do not depend on the length, as GGUF files carry them."""
    short, long = raw.get("short_factor"), raw.get("long_factor")
    if not isinstance(short, list) or short != long:
        raise ModelError(
            "config.json: rope_type='longrope' is supported only where short_factor equals "
            "long_factor (frequencies that do not change with the length)"
        )
    factors = tuple(fields.checked("short_factor", factor) for factor in short)
    return RopeSpec(
        kind="longrope",
        theta=theta,
        attention_factor=fields.number("attention_factor", 1.0),
        frequency_factors=factors,
    )
