"""What every latent attention backend must do: agree with plain float64 over paged steps.

In both forms, whatever the lengths, and however few tokens are expanded at a time. Unused slots of
the pool, the scratch page included, hold NaN: a backend that lets them reach its result fails.
Triton runs in its interpreter where there is no GPU, so its cases are few and small.
"""

import importlib
from functools import partial

import pytest
import torch

from core.interfaces.latent_attention import LatentAttentionBackend, LatentAttentionSpec
from core.plugin.hookspecs import NoOptions
from core.testing.latent_attention import (
    CASES,
    SMALL,
    TOLERANCE,
    Case,
    Step,
    check_backend,
    check_captured,
    check_parts,
    check_step,
    make_step,
    random_cases,
)

_MODULES = {
    "cpu": "plugins.attention._cpu.latent",
    "triton": "plugins.attention._triton_latent.backend",
}


def build(name: str, spec: LatentAttentionSpec) -> LatentAttentionBackend:
    """The backend as the plugin table makes it."""
    plugin = importlib.import_module(f"plugins.attention.{name}")
    (registration,) = plugin.register_latent_attention()
    assert registration.name == name
    module, _, attribute = registration.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    backend: LatentAttentionBackend = factory(NoOptions(), spec)
    return backend


def check(name: str, step: Step, tolerance: float) -> None:
    """Two layers of one plan, in either form."""
    check_step(partial(build, name), step, tolerance)


def check_parts_of(
    name: str, step: Step, tolerance: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expanded form where only about `tokens` tokens may be expanded at a time."""
    spec = step.spec
    module = importlib.import_module(_MODULES[name])
    dims = 2 * max(spec.nope_dim + spec.rope_dim, spec.value_dim)
    monkeypatch.setattr(
        module, "_EXPANDED_BYTES", tokens * dims * spec.num_heads * spec.dtype.itemsize
    )
    check_parts(partial(build, name), step, tolerance, 2 * tokens)


DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["torch_ref", "cpu"])
def test_torch_backends_equal_float64(name: str, case: Case, dtype: torch.dtype) -> None:
    check_backend(partial(build, name), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("case", [*SMALL, *random_cases(6)], ids=str)
def test_cpu_expands_a_part_of_the_context_at_a_time(
    case: Case, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(case, dtype, torch.device("cpu"))
    check_parts_of("cpu", step, TOLERANCE[dtype], tokens, monkeypatch)


@pytest.mark.parametrize("case", list(random_cases(4)), ids=str)
def test_absorbed_equals_expanded(case: Case) -> None:
    """The oracle, in float64: folding the expansion into queries and outputs changes nothing."""
    step = make_step(case, torch.float64, torch.device("cpu"))
    spec = step.spec
    backend = build("torch_ref", spec)
    plan = backend.plan(step.batch)
    q_nope_THN, q_rope_THR = step.q_THD.split((spec.nope_dim, spec.rope_dim), dim=2)
    q_THC = torch.einsum("thn,hnc->thc", q_nope_THN, step.key_HNC)
    out_THC = torch.empty_like(step.expected_THC)
    backend.absorbed(plan, step.cache_BPZ, q_THC, q_rope_THR, out_THC)
    restored_THV = torch.einsum("thc,hvc->thv", out_THC, step.value_HVC)
    torch.testing.assert_close(restored_THV, step.expected_THV, rtol=1e-10, atol=1e-12)


DECODES = [case for case in [*SMALL, *random_cases(8)] if set(case.rows) == {1}]


@pytest.mark.parametrize("padding", [1, 37])
@pytest.mark.parametrize("case", DECODES, ids=str)
def test_padding_becomes_zero_and_bounds_do_not_matter(case: Case, padding: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    check_captured(
        partial(build, "triton"), make_step(case, dtype, device), TOLERANCE[dtype], padding
    )


# Empty lists make pytest skip a test once: Triton is either interpreted or compiled.
INTERPRETED = [] if torch.cuda.is_available() else [*SMALL, *random_cases(4)]
COMPILED = CASES if torch.cuda.is_available() else []


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton_interpreted_equals_float64(case: Case, dtype: torch.dtype) -> None:
    # The interpreter truncates to bf16 where a GPU rounds.
    tolerance = 2 * TOLERANCE[dtype] if dtype is torch.bfloat16 else TOLERANCE[dtype]
    check("triton", make_step(case, dtype, torch.device("cpu")), tolerance)


@pytest.mark.each_choice
@pytest.mark.parametrize("tokens", [21, 64])
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton_interpreted_expands_a_part_at_a_time(
    case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(case, torch.float32, torch.device("cpu"))
    check_parts_of("triton", step, TOLERANCE[torch.float32], tokens, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("name", ["torch_ref", "triton"])
def test_gpu_backends_equal_float64(name: str, case: Case, dtype: torch.dtype) -> None:
    check(name, make_step(case, dtype, torch.device("cuda")), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [7, 64])
@pytest.mark.parametrize("case", COMPILED[: len(SMALL)], ids=str)
def test_gpu_expands_a_part_of_the_context_at_a_time(
    case: Case, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(case, dtype, torch.device("cuda"))
    check_parts_of("triton", step, TOLERANCE[dtype], tokens, monkeypatch)
