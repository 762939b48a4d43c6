"""Whole decoders against transformers, in float32, alone and spread over ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models import (
    TINY_MODELS,
    VOCAB_SIZE,
    DenseAttention,
    build_model,
    folder_files,
    run_model,
    tp_logits,
)
from tests.support.oracle import TransformersOracle

Folder = Callable[[str], Path]
PROMPT = torch.randint(VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_those_of_transformers(tiny_folder: Folder, name: str) -> None:
    expected = TransformersOracle(tiny_folder(name)).logits(PROMPT)
    assert expected.std() > 0.5  # not a model that says the same everywhere
    model = build_model(folder_files(tiny_folder(name)))
    assert_close(run_model(model, PROMPT), expected)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_chunks_give_the_same_logits(tiny_folder: Folder, name: str) -> None:
    model = build_model(folder_files(tiny_folder(name)))
    assert_close(run_model(model, PROMPT, chunk=17), run_model(model, PROMPT))


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("llama", 2),
        ("llama_odd", 3),
        ("llama_odd", 9),  # more ranks than KV heads
        ("llama_tied", 12),  # four KV heads, each on three ranks
        ("llama_biased", 4),
        ("mistral", 2),
        ("qwen2", 2),
        ("qwen3", 4),
        ("qwen3_tied", 2),
    ],
)
def test_ranks_agree_with_transformers(tiny_folder: Folder, name: str, tp: int) -> None:
    expected = TransformersOracle(tiny_folder(name)).logits(PROMPT)
    ranks = tp_logits(folder_files(tiny_folder(name)), tp, PROMPT)
    for logits in ranks:
        assert_close(logits, expected)


@torch.inference_mode()
def test_bfloat16_is_as_close_as_in_transformers(tiny_folder: Folder) -> None:
    oracle = TransformersOracle(tiny_folder("llama"))
    exact = oracle.logits(PROMPT)
    model = build_model(folder_files(tiny_folder("llama")), dtype=torch.bfloat16)
    rounded = run_model(model, PROMPT)
    assert rounded.dtype == torch.float32
    theirs = oracle.model.to(torch.bfloat16)(torch.tensor([PROMPT])).logits[0].float()
    assert (rounded - exact).norm() < 1.2 * (theirs - exact).norm()


def test_kv_shape_is_that_of_the_rank(tiny_folder: Folder) -> None:
    model = build_model(folder_files(tiny_folder("llama")))
    assert (model.num_heads, model.kv.num_kv_heads, model.kv.head_dim) == (12, 4, 16)
    assert model.kv.num_layers == 3
    assert model.kv.scale == 0.25


@torch.inference_mode()
def test_zero_rows_pass_through(tiny_folder: Folder) -> None:
    model = build_model(folder_files(tiny_folder("qwen3")))
    none = torch.empty(0, dtype=torch.int64)
    hidden = model.forward(none, none, DenseAttention(model.kv.scale))
    assert hidden.shape == (0, 96)
    assert model.logits(hidden).shape == (0, VOCAB_SIZE)
