"""Whole decoders against transformers, in float32, alone and spread over ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.interfaces.model import KVShape, LatentKVShape, Model, ModelStep, WantedRows
from core.parallel.plan import Plan
from core.parallel.rows import solo_rows
from tests.support.models import (
    EXPERT_MODELS,
    TINY_MODELS,
    VOCAB_SIZE,
    DenseAttention,
    build_model,
    folder_files,
    plan_logits,
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


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", *EXPERT_MODELS])
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
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_wanted_rows_are_as_among_all(tiny_folder: Folder, name: str) -> None:
    model = build_model(folder_files(tiny_folder(name)))
    index_R = torch.tensor([len(PROMPT) - 1, 3, 70, 3])
    wanted = hidden_states(
        model, WantedRows(index_R, solo_rows(4), torch.tensor([4], dtype=torch.int32))
    )
    assert_close(wanted, hidden_states(model, None)[index_R])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_shortened_model_meets_what_the_whole_one_does(tiny_folder: Folder, name: str) -> None:
    model = build_model(folder_files(tiny_folder(name)))
    wanted = WantedRows(torch.tensor([5, 7]), solo_rows(2), torch.tensor([2], dtype=torch.int32))
    met, met_short = (
        {(type(mlp), num_rows) for mlp, num_rows in rows_of_mlps(each, wanted)}
        for each in (model, model.shortened())
    )
    assert met_short == met
    assert {num_rows for _, num_rows in met} == {2, len(PROMPT)}


def hidden_states(model: Model, wanted: WantedRows | None) -> torch.Tensor:
    count = len(PROMPT)
    attention = DenseAttention(model.kv.scale, num_real=count)
    num_real = torch.tensor([count], dtype=torch.int32)
    step = ModelStep(attention, attention, solo_rows(count), "prefill", num_real, wanted)
    return model.forward(torch.tensor(PROMPT), torch.arange(count), step)


def rows_of_mlps(model: Any, wanted: WantedRows) -> list[tuple[object, int]]:
    """Every MLP that a step calls, with the rows that it is given."""
    called: list[tuple[object, int]] = []
    mlps = {layer: layer.mlp for layer in model._layers}

    def recorded(mlp: Any) -> Any:
        def partial(x_TE: torch.Tensor, step: ModelStep) -> torch.Tensor:
            called.append((mlp, x_TE.shape[0]))
            return mlp.partial(x_TE, step)

        return SimpleNamespace(partial=partial, exchange=mlp.exchange)

    for layer, mlp in mlps.items():
        layer.mlp = recorded(mlp)
    hidden_states(model, wanted)
    for layer, mlp in mlps.items():
        layer.mlp = mlp
    return called


PLANS = [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 4, 1), (4, 4, 2), (4, 4, 4), (4, 2, 2), (4, 1, 2)]


@pytest.mark.parametrize(("tp", "ep", "dp"), PLANS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v2_lite"])
def test_experts_over_ranks_agree_with_transformers(
    tiny_folder: Folder, name: str, tp: int, ep: int, dp: int
) -> None:
    # Prompts of unequal length: ranks idle in the last steps, and rows are no multiple of ranks.
    prompts = [PROMPT[:40], PROMPT[40:63], PROMPT[63:94], PROMPT[94:101]][:dp]
    oracle = TransformersOracle(tiny_folder(name))
    expected = [oracle.logits(prompt) for prompt in prompts]
    plan = Plan(dp=dp, tp_attn=tp // dp, ep=ep, tp_expert=tp // ep)
    for rank, logits in enumerate(
        plan_logits(folder_files(tiny_folder(name)), plan, prompts, chunk=11, a2a="nccl")
    ):
        assert_close(logits, expected[plan.axis_index("dp", rank)])


@pytest.mark.parametrize(
    "plan",
    [
        Plan(dp=2, tp_attn=2, ep=4, tp_dense=4),
        Plan(dp=4, ep=4, tp_dense=2),
        Plan(dp=2, tp_attn=2, ep=4, dp_lm_head=True),
        Plan(dp=2, tp_attn=2, ep=4, redundant_experts=4),
    ],
    ids=["dense_tp_4", "dense_tp_2", "dp_lm_head", "redundant_experts"],
)
def test_variants_of_a_plan_agree_with_transformers(tiny_folder: Folder, plan: Plan) -> None:
    prompts = [PROMPT[:17], PROMPT[17:30], PROMPT[30:31], PROMPT[31:50]][: plan.dp]
    oracle = TransformersOracle(tiny_folder("deepseek_v3"))
    expected = [oracle.logits(prompt) for prompt in prompts]
    files = folder_files(tiny_folder("deepseek_v3"))
    for rank, logits in enumerate(plan_logits(files, plan, prompts, chunk=8)):
        assert_close(logits, expected[plan.axis_index("dp", rank)])


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
    assert isinstance(model.kv, KVShape)
    assert (model.num_heads, model.kv.num_kv_heads, model.kv.head_dim) == (12, 4, 16)
    assert model.kv.num_layers == 3
    assert model.kv.scale == 0.25


def test_latent_kv_shape_is_the_same_on_every_rank(tiny_folder: Folder) -> None:
    model = build_model(folder_files(tiny_folder("deepseek_v3")))
    assert isinstance(model.kv, LatentKVShape)
    assert (model.num_heads, model.kv.token_values, model.kv.num_layers) == (8, 40, 3)
    # YaRN's temperature, squared: 0.1 * mscale_all_dim * ln(factor) + 1.
    assert model.kv.scale == pytest.approx(24**-0.5 * (0.08 * 1.3862943611 + 1) ** 2)


@torch.inference_mode()
def test_zero_rows_pass_through(tiny_folder: Folder) -> None:
    model = build_model(folder_files(tiny_folder("qwen3")))
    none = torch.empty(0, dtype=torch.int64)
    attention = DenseAttention(model.kv.scale, num_real=0)
    hidden = model.forward(
        none,
        none,
        ModelStep(attention, attention, solo_rows(0), "decode", torch.zeros(1, dtype=torch.int32)),
    )
    assert hidden.shape == (0, 96)
    head, rows = model.head, solo_rows(0)
    assert head.whole(head.partial(hidden, rows), rows).shape == (0, VOCAB_SIZE)
