"""GGUF models: weights, order of rows, config; compared with the folder they were made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize
from safetensors.torch import load_file

from core.errors import ModelError
from core.ops.grouped_ints import dequantize as dequantize_groups
from plugins.checkpoints._gguf.config import GROUPED_BITS, group_bits, hf_config
from plugins.checkpoints._gguf.dequantize import dequantize, grouped
from plugins.checkpoints._gguf.header import read_gguf
from plugins.checkpoints._gguf.source import GGUFSource
from tests.support.gguf_files import write_gguf
from tests.support.models import build_model, folder_files, run_model, tp_logits
from tests.support.weights import read_slice

Folder = Callable[[str], Path]
Kind = GGMLQuantizationType
PROMPT = torch.randint(256, (60,), generator=torch.Generator().manual_seed(2)).tolist()


def random_blocks(kind: Kind, num_rows: int, num_columns: int) -> np.ndarray:
    """Random bytes with sane scales, so that every bit pattern of the values occurs."""
    from gguf.constants import GGML_QUANT_SIZES

    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(3)
    shape = (num_rows, num_columns // block_size, block_bytes)
    raw = generator.integers(0, 256, shape, dtype=np.uint8)
    half = generator.uniform(0.001, 0.1, (*shape[:2], 2)).astype(np.float16).view(np.uint8)
    offset = block_bytes - 2 if kind is Kind.Q6_K else 0
    raw[..., offset : offset + 2] = half[..., :2]
    if kind in (Kind.Q4_1, Kind.Q4_K, Kind.Q5_1, Kind.Q5_K):
        raw[..., 2:4] = half[..., 2:]
    return raw.reshape(num_rows, -1)


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_K]
)
@pytest.mark.parametrize("shape", [(7, 512), (300, 256), (3, 65536)])
def test_dequantised_values_are_the_librarys(kind: Kind, shape: tuple[int, int]) -> None:
    raw = random_blocks(kind, *shape)
    expected = torch.from_numpy(reference_dequantize(raw, kind))
    assert expected.std() > 0
    found = dequantize(torch.from_numpy(raw), kind, torch.float32, "w")
    assert torch.equal(found, expected)
    rounded = dequantize(torch.from_numpy(raw), kind, torch.bfloat16, "w")
    assert torch.equal(rounded, expected.to(torch.bfloat16))


@pytest.mark.parametrize("kind", GROUPED_BITS)
def test_groups_hold_what_is_dequantised(kind: Kind) -> None:
    raw = random_blocks(kind, 7, 512)
    found = grouped(torch.from_numpy(raw), kind)
    assert found.bits == GROUPED_BITS[kind]
    assert found.values_OI.dtype is torch.uint8
    assert int(found.values_OI.max()) == 2**found.bits - 1
    expected = torch.from_numpy(reference_dequantize(raw, kind))
    torch.testing.assert_close(dequantize_groups(found, torch.float32), expected)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_groups_of_every_slice_are_those_of_the_whole(
    tiny_folder: Folder, tmp_path: Path, kind: Kind
) -> None:
    path = write_gguf(tiny_folder("llama"), tmp_path / "model.gguf", kind)
    source = GGUFSource(str(path), torch.float32)
    bits = group_bits(read_gguf(str(path)))
    assert {name: info.group_bits for name, info in source.tensors().items()} == {
        name: bits.get(name, 0) for name in source.tensors()
    }
    for name in ("q_proj.weight", "v_proj.weight"):
        name = f"model.layers.1.self_attn.{name}"
        assert bits[name] == GROUPED_BITS[kind]
        num_rows, num_columns = source.tensors()[name].shape
        whole = read_slice(source, name, 0, 0, num_rows)
        for dim, size, steps in ((0, num_rows, 1), (1, num_columns, 32)):
            for start, stop in ((0, size), (steps, 2 * steps), (size - 2 * steps, size)):
                found = source.groups(name, dim, start, stop, torch.empty(700, dtype=torch.uint8))
                expected = whole.narrow(dim, start, stop - start)
                torch.testing.assert_close(dequantize_groups(found, torch.float32), expected)


def test_large_tensors_are_shared_out_over_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.checkpoints._gguf.dequantize.VALUES_PER_THREAD", 1 << 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    raw = random_blocks(Kind.Q4_1, 100, 512)
    expected = torch.from_numpy(reference_dequantize(raw, Kind.Q4_1))
    assert torch.equal(dequantize(torch.from_numpy(raw), Kind.Q4_1, torch.float32, "w"), expected)


def test_types_nobody_can_read_are_named() -> None:
    raw = torch.zeros(1, 292, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"w has the type Q8_K.*Q4_1"):
        dequantize(raw, Kind.Q8_K, torch.float32, "w")


@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen2", "qwen3_tied"])
def test_model_is_the_one_it_was_made_from(tiny_folder: Folder, tmp_path: Path, name: str) -> None:
    files = folder_files(write_gguf(tiny_folder(name), tmp_path / "model.gguf"))
    expected = run_model(build_model(folder_files(tiny_folder(name))), PROMPT)
    assert torch.equal(run_model(build_model(files), PROMPT), expected)
    for logits in tp_logits(files, 2, PROMPT):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0])
def test_every_slice_is_that_of_the_whole(tiny_folder: Folder, tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tiny_folder("llama"), tmp_path / "model.gguf", kind)
    source = GGUFSource(str(path), torch.float32)
    original = load_file(tiny_folder("llama") / "model.safetensors")
    assert set(source.tensors()) == set(original)
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        name = f"model.layers.1.self_attn.{name}"
        stored = quantize(original[name].numpy(), kind)
        whole = torch.from_numpy(np.array(reference_dequantize(stored, kind)))
        for dim, size in enumerate(whole.shape):
            for start, stop in ((0, size), (0, 1), (3, 21), (16, 32), (33, size), (size, size)):
                found = read_slice(source, name, dim, start, stop).float()
                assert torch.equal(found, whole.narrow(dim, start, stop - start))
    norm = read_slice(source, "model.norm.weight", 0, 5, 9)
    assert torch.equal(norm, original["model.norm.weight"][5:9])


def test_config_is_the_one_it_was_made_from(tiny_folder: Folder, tmp_path: Path) -> None:
    for name in ("llama", "llama_tied", "qwen3"):
        path = write_gguf(tiny_folder(name), tmp_path / f"{name}.gguf")
        config = hf_config(read_gguf(str(path)))
        original = folder_files(tiny_folder(name)).hf_config
        for key in ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers"):
            assert config[key] == original[key]
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
            assert config[key] == original[key]
        assert config["tie_word_embeddings"] == original["tie_word_embeddings"]
        assert config["rms_norm_eps"] == pytest.approx(original["rms_norm_eps"])
        assert config["dtype"] == "float32"


def test_llama3_scaling_comes_as_a_tensor_of_factors(tiny_folder: Folder, tmp_path: Path) -> None:
    """Converters store original / scaled frequency of each pair as rope_freqs.weight."""
    from gguf import GGUFWriter
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from core.layers.attention.rope import rope_table
    from core.layers.attention.rope_spec import parse_rope

    folder = tiny_folder("llama_tied")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder), device="cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    assert not torch.equal(scaled, plain)
    writes = GGUFWriter.write_header_to_file

    def write_with_factors(self: Any, *args: Any) -> None:
        self.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
        writes(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", write_with_factors)
        path = write_gguf(folder, tmp_path / "model.gguf")
    rope = parse_rope(hf_config(read_gguf(str(path))))
    found = rope_table(rope, 16, 200, torch.device("cpu"))
    expected = rope_table(parse_rope(folder_files(folder).hf_config), 16, 200, found.device)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    build_model(folder_files(path))  # the factors are not surplus


def test_header_is_what_the_library_reads(tiny_folder: Folder, tmp_path: Path) -> None:
    extra = {"x.text": "ü\U0001f600", "x.list": [1, 2, 3], "x.flags": [True, False], "x.f": 0.5}
    path = write_gguf(tiny_folder("qwen3"), tmp_path / "model.gguf", Kind.Q8_0, extra)
    found, expected = read_gguf(str(path)), GGUFReader(path)
    assert set(found.tensors) == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        mine = found.tensors[tensor.name]
        assert mine.start == tensor.data_offset
        assert mine.num_bytes == tensor.n_bytes
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
    theirs = {k: f.contents() for k, f in expected.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata == theirs


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "mamba"}, ["general.architecture='mamba'", "llama", "qwen3"]),
        ({"llama.block_count": "three"}, ["llama.block_count='three'", "whole number"]),
        ({"llama.embedding_length": None}, ["llama.embedding_length is missing"]),
        ({"llama.expert_count": 8}, ["expert_count"]),
        ({"split.count": 3}, ["one of 3 parts", "llama-gguf-split --merge"]),
    ],
)
def test_metadata_that_does_not_describe_a_model(
    tiny_folder: Folder, tmp_path: Path, metadata: dict[str, Any], words: list[str]
) -> None:
    file = read_gguf(str(write_gguf(tiny_folder("llama"), tmp_path / "model.gguf")))
    changed = dict(file.metadata) | metadata
    changed = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ModelError) as error:
        hf_config(type(file)(file.path, changed, file.tensors))
    assert all(word in str(error.value) for word in words)
