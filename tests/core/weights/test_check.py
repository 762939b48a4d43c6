"""A checkpoint against what a model needs, by headers alone: every kind of mismatch is named."""

import difflib
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoints.open import open_weights
from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.interfaces.weights import Shard, TensorInfo, WeightReader
from core.settings.config import ModelConfig
from core.weights.check import check_checkpoint
from core.weights.manifest import BLOCK
from core.weights.reader import ShapeReader
from tests.support.formats import FORMATS
from tests.support.models import CPU, ignore_progress

FP8 = torch.float8_e4m3fn
TENSORS = {
    "embed.weight": torch.zeros(64, 16),
    "layers.0.w.weight": torch.zeros(32, 16),
    "layers.1.w.weight": torch.zeros(32, 16),
    "norm.weight": torch.zeros(16),
}


def shapes_of(tensors: dict[str, Tensor]) -> ShapeReader:
    """What a model of just these tensors takes."""
    shapes = ShapeReader(torch.float32)
    for name, tensor in tensors.items():
        shapes.take(name, tuple(tensor.shape))
    return shapes


def infos(tensors: dict[str, Tensor], file: str = "a.safetensors") -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), t.dtype, file) for name, t in tensors.items()}


def problems(stored: dict[str, TensorInfo], shapes: ShapeReader, *ignored: str) -> str:
    with pytest.raises(ModelError) as error:
        check_checkpoint(stored, shapes.manifest, block=BLOCK, ignored=ignored)
    return str(error.value)


def test_what_belongs_together_passes() -> None:
    known = {"lm_head.weight": torch.zeros(2), "layers.0.rotary_emb.inv_freq": torch.zeros(2)}
    check_checkpoint(infos(TENSORS | known), shapes_of(TENSORS).manifest, block=BLOCK)


def test_all_kinds_of_problems_are_told_at_once() -> None:
    stored = infos(TENSORS)
    del stored["norm.weight"]
    stored["embed.weight"] = TensorInfo((64, 17), torch.float32, "b.safetensors")
    stored["layers.0.w.weight"] = TensorInfo((32, 16), torch.int8, "b.safetensors")
    stored["layers.2.w.weight"] = stored["layers.1.w.weight"]
    message = problems(stored, shapes_of(TENSORS))
    for words in (
        "tensor norm.weight of shape 16 is missing from the 2 weight files",
        "tensor embed.weight in b.safetensors has shape 64x17, but config.json needs 64x16",
        "tensor layers.0.w.weight in b.safetensors has dtype torch.int8",
        "1 tensor of the checkpoint is not part of the model that config.json describes: "
        "layers.2.w.weight (in a.safetensors)",
        "check that the config and the weights belong together",
    ):
        assert words in message


def test_many_are_counted_and_five_are_shown() -> None:
    many = {f"layers.{i}.x": torch.zeros(3, 2) for i in range(9)}
    message = problems(infos(TENSORS), shapes_of(TENSORS | many))
    assert "9 tensors are missing from a.safetensors: layers.0.x of shape 3x2, layers.1" in message
    assert "layers.4.x" in message
    assert "layers.5.x" not in message
    message = problems(infos(TENSORS | many), shapes_of(TENSORS))
    assert "9 tensors of the checkpoint are not part" in message
    assert "layers.5.x" not in message
    other = {name: torch.zeros(2, 3) for name in many}
    message = problems(infos(many), shapes_of(other))
    assert message.count("has shape 3x2, but config.json needs 2x3") == 5
    assert "4 more tensors have another shape or dtype" in message


def test_ignored_prefixes_are_no_surplus() -> None:
    extra = {"layers.61.w.weight": torch.zeros(2), "layers.6.w.weight": torch.zeros(2)}
    message = problems(infos(TENSORS | extra), shapes_of(TENSORS), "layers.61.")
    assert "layers.6.w.weight" in message
    assert "layers.61" not in message


def test_quantised_matrices_need_their_scales() -> None:
    quantised = {"w.weight": torch.zeros(300, 200, dtype=FP8)}
    scales = {"w.weight_scale_inv": torch.zeros(3, 2)}
    plain, blocks = shapes_of(quantised), ShapeReader(torch.bfloat16)
    blocks.take_blocks("w.weight", (300, 200))
    for shapes in (plain, blocks):
        check_checkpoint(infos(quantised | scales), shapes.manifest, block=BLOCK)
        message = problems(infos(quantised), shapes)
        assert "w.weight_scale_inv of shape 3x2 is missing" in message
        wrong = {"w.weight_scale_inv": torch.zeros(2, 2)}
        assert "has shape 2x2" in problems(infos(quantised | wrong), shapes)
    assert "float8_e4m3fn blocks" in problems(infos({"w.weight": torch.zeros(300, 200)}), blocks)


def take_layer(reader: WeightReader, layer: int) -> Tensor:
    return reader.scope(f"layers.{layer}").take("w.weight", (32, 16), Shard(0, 0, 2))


def test_a_rank_that_keeps_some_layers_sees_damage_in_all(tmp_path: Path) -> None:
    """As with experts: what another rank takes is no surplus, and missing there is known here."""
    path = tmp_path / "model.safetensors"
    files = ModelFiles(
        hf_config={},
        weight_files=[str(path)],
        weight_format="safetensors",
        tokenizer_dir="",
        eos_ids=[],
        default_sampling={},
    )

    def load() -> Tensor:
        rank = ShapeReader(torch.float32)
        take_layer(rank, 0)
        reader = open_weights(
            ModelConfig(name="x"),
            files,
            FORMATS,
            dtype=torch.float32,
            device=CPU,
            on_progress=ignore_progress,
            rank_shapes=rank,
            model_shapes=shapes_of(TENSORS),
        )
        part = take_layer(reader, 0)
        reader.finish()
        return part

    save_file(TENSORS | {"layers.0.w.weight": torch.ones(32, 16)}, path)
    assert torch.equal(load(), torch.ones(16, 16))
    save_file({k: v for k, v in TENSORS.items() if k != "layers.1.w.weight"}, path)
    with pytest.raises(ModelError, match=rf"layers\.1\.w\.weight .* is missing from {path}"):
        load()


def test_ninety_thousand_tensors_are_compared_quickly() -> None:
    shapes = ShapeReader(torch.bfloat16)
    for layer in range(58):
        experts = shapes.scope(f"model.layers.{layer}.mlp.experts")
        for expert in range(256):
            for part in ("gate_proj", "up_proj", "down_proj"):
                experts.take(f"{expert}.{part}.weight", (2048, 7168))
    scales = TensorInfo((16, 56), torch.float32, "f")
    stored = {}
    for take in shapes.manifest:
        stored[take.name] = TensorInfo(take.shape, FP8, "f")
        stored[f"{take.name}_scale_inv"] = scales
    start = time.process_time()
    check_checkpoint(stored, shapes.manifest, block=BLOCK)
    del stored["model.layers.57.mlp.experts.255.up_proj.weight"]
    message = problems(stored, shapes)
    assert "closest there is: model.layers.57.mlp.experts.255.up_proj" in message
    assert time.process_time() - start < 5


def test_a_missing_name_is_compared_with_some_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all names of a large checkpoint begin as it does."""
    compared = []

    def compare(name: str, others: list[str], most: int) -> list[str]:
        compared.append(len(others))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", compare)
    shapes = ShapeReader(torch.float32)
    shapes.take("model.norm.weight", (8,))
    stored = {f"model.layers.{n}.w": TensorInfo((8,), torch.float32, "f") for n in range(5000)}
    assert "model.norm.weight of shape 8 is missing" in problems(stored, shapes)
    assert compared == [1000]
