"""The table of rotary angles: one for each model, shared by its layers.

Frequencies follow the definitions in transformers' `modeling_rope_utils`, in float32, because
greedy answers depend on them bit for bit. Shape legend: C positions, D values of a head that turn,
F = D/2.
"""

import math

import torch
from torch import Tensor

from core.layers.attention.rope_spec import RopeSpec


def rope_table(spec: RopeSpec, rope_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """cos in the first D/2 columns, sin in the rest: (C, D) float32 on `device`."""
    if device.type == "meta":  # computing there makes torch import its compiler: a second or more
        return torch.empty((num_positions, rope_dim), dtype=torch.float32, device=device)
    inv_freq_F, scale = _frequencies(spec, rope_dim)
    positions_C = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles_CF = torch.outer(positions_C, inv_freq_F.to(device))
    table_CD = torch.cat((angles_CF.cos(), angles_CF.sin()), dim=-1)
    return table_CD if scale == 1.0 else table_CD.mul_(scale)


def _frequencies(spec: RopeSpec, rope_dim: int) -> tuple[Tensor, float]:
    """Radians a token of each pair of dimensions, and the factor on cos and sin."""
    exponents_F = torch.arange(0, rope_dim, 2, dtype=torch.int64).float() / rope_dim
    periods_F = spec.theta**exponents_F
    match spec.kind:
        case "default":
            return 1.0 / periods_F, 1.0
        case "linear":
            return 1.0 / periods_F / spec.factor, 1.0
        case "llama3":
            return _llama3(spec, 1.0 / periods_F), 1.0
        case "yarn":
            return _yarn(spec, periods_F, rope_dim), _yarn_scale(spec)
        case "longrope":
            factors_F = torch.tensor(spec.frequency_factors, dtype=torch.float32)
            return 1.0 / (factors_F * periods_F), spec.attention_factor or 1.0
        case _:
            raise AssertionError(f"rope type {spec.kind!r} passed the parser")


def _llama3(spec: RopeSpec, inv_freq_F: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated.

    Source: Llama 3.1's model code (meta-llama/llama-models, `apply_scaling`).
    """
    old_context = spec.original_max_positions
    low, high = spec.low_freq_factor, spec.high_freq_factor
    wavelength_F = 2 * math.pi / inv_freq_F
    is_long_F = wavelength_F > old_context / low
    is_short_F = wavelength_F < old_context / high
    scaled_F = torch.where(is_long_F, inv_freq_F / spec.factor, inv_freq_F)
    smooth_F = (old_context / wavelength_F - low) / (high - low)
    smoothed_F = (1 - smooth_F) * scaled_F / spec.factor + smooth_F * scaled_F
    return torch.where(~is_long_F & ~is_short_F, smoothed_F, scaled_F)


def _yarn(spec: RopeSpec, periods_F: Tensor, rope_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): a ramp over dimensions from kept to stretched frequencies."""

    def dimension_of(num_rotations: float) -> float:
        ratio = spec.original_max_positions / (num_rotations * 2 * math.pi)
        return rope_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    if low == high:
        high += 0.001  # the ramp divides by the difference
    ramp_F = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (spec.factor * periods_F) * (1 - kept_F) + 1.0 / periods_F * kept_F


def _yarn_scale(spec: RopeSpec) -> float:
    """The factor on cos and sin, as YaRN or the config gives it."""

    def mscale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale is not None and spec.mscale_all_dim is not None:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)
