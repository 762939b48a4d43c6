"""Checkpoints in fp8 blocks as DeepSeek and Qwen publish them, made of plain ones, and the same
numbers once more as plain weights for an oracle that knows no fp8."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
WEIGHTS = "model.safetensors"
# config.json's quantization_config of DeepSeek-V3, of V3.1, and of Qwen3's -FP8 checkpoints, which
# names modules one by one.
DEEPSEEK: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
DEEPSEEK_V31 = DEEPSEEK | {"scale_fmt": "ue8m0"}
QWEN = DEEPSEEK | {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}


def write_fp8_twins(
    plain: Path, folder: Path, scales: torch.dtype, quantization: dict[str, Any]
) -> tuple[Path, Path]:
    """(folder in fp8 blocks with scales of that dtype, folder of the same numbers in float32)."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(plain / WEIGHTS).items():
        if not _is_quantised(name, weight):
            stored[name] = meant[name] = weight
            continue
        values, scales_BC = _blocks(weight, scales)
        stored[name], stored[f"{name}_scale_inv"] = values, scales_BC
        meant[name] = (values.double() * _spread(scales_BC.double(), weight)).float()
    twins = folder / "fp8", folder / "plain"
    for twin, tensors in zip(twins, (stored, meant), strict=True):
        shutil.copytree(plain, twin)
        save_file(tensors, twin / WEIGHTS, {"format": "pt"})
    config = twins[0] / "config.json"
    content = json.loads(config.read_text()) | {"quantization_config": quantization}
    config.write_text(json.dumps(content))
    return twins


def _is_quantised(name: str, weight: Tensor) -> bool:
    """Projections are; embeddings, output heads, norms and routers are not."""
    others = ("embed_tokens.weight", "lm_head.weight", ".mlp.gate.weight")
    return weight.dim() == 2 and not name.endswith(others)


def _blocks(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in float8_e4m3fn and one scale a block; a scale is rounded before it divides."""
    num_outputs, num_inputs = weight_OI.shape
    scales_BC = torch.stack(
        [
            torch.stack([block.abs().max() / (LARGEST - 16) for block in rows.split(BLOCK, 1)])
            for rows in weight_OI.split(BLOCK, 0)
        ]
    ).to(dtype)
    assert scales_BC.shape == (-(-num_outputs // BLOCK), -(-num_inputs // BLOCK))
    values_OI = weight_OI / _spread(scales_BC.float(), weight_OI)
    return values_OI.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales_BC


def _spread(scales_BC: Tensor, weight_OI: Tensor) -> Tensor:
    """A scale for each value."""
    num_outputs, num_inputs = weight_OI.shape
    rows = scales_BC[torch.arange(num_outputs) // BLOCK]
    return rows[:, torch.arange(num_inputs) // BLOCK]
