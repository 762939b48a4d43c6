"""What every latent attention backend must do: agree with plain float64 over paged steps.

In both forms, whatever the lengths, and however few tokens are expanded at a time. Unused slots of
the pool, the scratch page included, hold NaN: a backend that lets them reach its result fails.
Triton runs in its interpreter where there is no GPU, so its cases are few and small.
"""

import importlib
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionBackend, LatentAttentionSpec
from core.plugin.hookspecs import NoOptions
from tests.contracts.latent_attention_cases import Case, Step, make_step, split_queries

V3 = (128, 64, 128, 512)
_MODULES = {
    "cpu": "plugins.attention._cpu.latent",
    "triton": "plugins.attention._triton_latent.backend",
}
ODD = (20, 12, 40, 24)  # no powers of two, values wider than keys
SMALL = [
    Case(rows=(1,), cached=(0,)),
    Case(rows=(1, 1, 1), cached=(0, 15, 16)),
    Case(rows=(1, 1, 1, 1), cached=(3, 200, 64, 63), page_size=64, num_heads=4),
    Case(rows=(1, 1), cached=(300, 2), page_size=1, num_heads=17),
    Case(rows=(5,), cached=(0,), page_size=1),
    Case(rows=(33, 2, 1), cached=(0, 0, 0)),
    Case(rows=(17, 1, 40), cached=(31, 64, 0), num_heads=4),
    Case(rows=(9, 50), cached=(3, 70), page_size=64, num_heads=2),
    Case(rows=(4, 2, 3), cached=(0, 100, 29), page_size=5, dims=ODD),
    Case(rows=(3, 1), cached=(40, 90), page_size=64, num_heads=2, dims=V3),
    Case(rows=(1,) * 31, cached=(60,) * 31, num_heads=2),  # equally long: programs end with them
]
LARGE = [
    Case(rows=(1,) * 24, cached=tuple(range(0, 2400, 100)), num_heads=8),
    Case(rows=(257, 1, 256), cached=(1, 900, 256), num_heads=2),
    Case(rows=(130, 70), cached=(0, 213), page_size=64, num_heads=8, dims=V3),
    Case(rows=(1, 1), cached=(500, 1000), page_size=1, num_heads=32, dims=V3),
]


def random_cases(count: int) -> Iterator[Case]:
    """Mixed lengths; every other case decodes."""
    source = random.Random(11)
    for seed in range(count):
        size = source.randint(1, 6)
        yield Case(
            rows=tuple(1 if seed % 2 else source.randint(1, 50) for _ in range(size)),
            cached=tuple(source.choice((0, source.randint(1, 180))) for _ in range(size)),
            page_size=source.choice((1, 16, 64)),
            num_heads=source.choice((1, 2, 5, 16)),
            dims=source.choice(((16, 8, 16, 32), ODD, (32, 16, 24, 64))),
            seed=seed,
        )


def build(name: str, spec: LatentAttentionSpec) -> LatentAttentionBackend:
    """The backend as the plugin table makes it."""
    plugin = importlib.import_module(f"plugins.attention.{name}")
    (registration,) = plugin.register_latent_attention()
    assert registration.name == name
    module, _, attribute = registration.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    backend: LatentAttentionBackend = factory(NoOptions(), spec)
    return backend


def compare(out: Tensor, expected: Tensor, tolerance: float) -> None:
    """By norm over each row; NaN never passes."""
    error_TX = (out.cpu().double() - expected).flatten(1)
    relative_T = error_TX.norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert relative_T.max().item() <= tolerance, relative_T


def check(name: str, step: Step, tolerance: float) -> None:
    """Two layers of one plan, in either form."""
    backend = build(name, step.spec)
    plan = backend.plan(step.batch)
    for _ in range(2):
        out_THC = step.q_THZ.new_full(step.expected_THC.shape, torch.nan)
        backend.absorbed(plan, step.cache_BPZ, *step.queries, out_THC)
        compare(out_THC, step.expected_THC, tolerance)
        out_THV = step.q_THD.new_full(step.expected_THV.shape, torch.nan)
        backend.expanded(plan, step.cache_BPZ, step.q_THD.clone(), step.expand, out_THV)
        compare(out_THV, step.expected_THV, tolerance)


def check_parts(
    name: str, step: Step, tolerance: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expanded form where only about `tokens` tokens may be expanded at a time."""
    spec = step.spec
    module = importlib.import_module(_MODULES[name])
    dims = 2 * max(spec.nope_dim + spec.rope_dim, spec.value_dim)
    monkeypatch.setattr(
        module, "_EXPANDED_BYTES", tokens * dims * spec.num_heads * spec.dtype.itemsize
    )
    backend = build(name, spec)
    out_THV = step.q_THD.new_full(step.expected_THV.shape, torch.nan)
    backend.expanded(
        backend.plan(step.batch), step.cache_BPZ, step.q_THD.clone(), step.expand, out_THV
    )
    compare(out_THV, step.expected_THV, tolerance)
    assert sum(step.expanded_tokens) == sum(step.batch.context_lens)
    assert max(step.expanded_tokens) <= 2 * tokens


def check_padded(name: str, step: Step, tolerance: float, padding: int) -> None:
    """As in a captured step: the host knows bounds, and the last sequences are padding."""
    batch, device = step.batch, step.spec.device
    rows, columns = batch.page_table_SM.shape
    num_rows = rows + padding
    padded = SequenceBatch(
        [1] * num_rows,
        [step.spec.max_context_tokens] * num_rows,
        torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        torch.cat((batch.context_lens_S, batch.context_lens_S.new_zeros(padding))),
        torch.cat((batch.page_table_SM, batch.page_table_SM.new_zeros(padding, columns))),
    )
    q_THZ = torch.cat((step.q_THZ, step.q_THZ.new_full((padding, *step.q_THZ.shape[1:]), 3.0)))
    out_THC = q_THZ.new_full((num_rows, *step.expected_THC.shape[1:]), torch.nan)
    backend = build(name, step.spec)
    assert backend.capturable
    queries = split_queries(step.spec, q_THZ)
    backend.absorbed(backend.plan(padded), step.cache_BPZ, *queries, out_THC)
    compare(out_THC[:rows], step.expected_THC, tolerance)
    assert not out_THC[rows:].any()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
EVERY = [*SMALL, *LARGE, *random_cases(16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("name", ["torch_ref", "cpu"])
def test_torch_backends_equal_float64(name: str, case: Case, dtype: torch.dtype) -> None:
    check(name, make_step(case, dtype, torch.device("cpu")), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("case", [*SMALL, *random_cases(6)], ids=str)
def test_cpu_expands_a_part_of_the_context_at_a_time(
    case: Case, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(case, dtype, torch.device("cpu"))
    check_parts("cpu", step, TOLERANCE[dtype], tokens, monkeypatch)


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
    check_padded("triton", make_step(case, dtype, device), TOLERANCE[dtype], padding)


# Empty lists make pytest skip a test once: Triton is either interpreted or compiled.
INTERPRETED = [] if torch.cuda.is_available() else [*SMALL, *random_cases(4)]
COMPILED = EVERY if torch.cuda.is_available() else []


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
    check_parts("triton", step, TOLERANCE[torch.float32], tokens, monkeypatch)


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
    check_parts("triton", step, TOLERANCE[dtype], tokens, monkeypatch)
