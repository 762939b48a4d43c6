"""What every attention backend must do: agree with plain float64 attention over paged steps.

Unused slots of the pool, the scratch page included, hold NaN: a backend that lets them reach its
result fails. Triton runs in its interpreter where there is no GPU, so its cases are few and small.
"""

import importlib
from functools import partial

import pytest
import torch

from core.interfaces.attention import (
    AttentionBackend,
    AttentionSpec,
    LayerKV,
    NewKV,
    SequenceBatch,
)
from core.plugin.hookspecs import NoOptions
from core.testing.attention import (
    CAPTURED,
    DECODE,
    LARGE,
    PREFILL,
    TOLERANCE,
    Case,
    Step,
    as_captured,
    assert_close,
    check_backend,
    check_captured,
    check_step,
    make_step,
    random_cases,
)


def build(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend as the plugin table makes it."""
    plugin = importlib.import_module(f"plugins.attention.{name}")
    (registration,) = plugin.register_attention()
    assert registration.name == name
    module, _, attribute = registration.factory.partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), attribute)(
        NoOptions(), spec
    )
    return backend


def check(name: str, step: Step, tolerance: float) -> None:
    check_step(partial(build, name), step, tolerance)


DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PREFILL, *DECODE, *LARGE, *random_cases(24)], ids=str)
@pytest.mark.parametrize("name", ["torch_ref", "cpu"])
def test_torch_backends_equal_float64(name: str, case: Case, dtype: torch.dtype) -> None:
    check_backend(partial(build, name), case, dtype)


# Empty lists make pytest skip a test once: Triton is either interpreted or compiled.
INTERPRETED = [] if torch.cuda.is_available() else [*PREFILL, *DECODE, *random_cases(6)]
COMPILED = [*PREFILL, *DECODE, *LARGE, *random_cases(24)] if torch.cuda.is_available() else []


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton_interpreted_equals_float64(case: Case, dtype: torch.dtype) -> None:
    # The interpreter truncates to bf16 where a GPU rounds.
    tolerance = 2 * TOLERANCE[dtype] if dtype is torch.bfloat16 else TOLERANCE[dtype]
    check("triton", make_step(case, dtype, torch.device("cpu")), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("name", ["torch_ref", "triton"])
def test_gpu_backends_equal_float64(name: str, case: Case, dtype: torch.dtype) -> None:
    check(name, make_step(case, dtype, torch.device("cuda")), TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, where interpreted
@pytest.mark.parametrize("rows", [(20, 30), (64, 1, 200)], ids=str)
def test_another_sequence_s_nan_stays_there(rows: tuple[int, ...]) -> None:
    """New rows lie back to back: a tile of the first sequence holds some of the next."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(rows=rows, cached=(0,) * len(rows), num_heads=2, num_kv_heads=1, head_dim=64)
    step = make_step(case, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    backend = build("triton", step.spec)
    k_TGD, v_TGD = step.new.k_TGD.clone(), step.new.v_TGD.clone()
    k_TGD[rows[0] :], v_TGD[rows[0] :] = torch.nan, torch.nan
    plan = backend.plan(step.batch)
    outs = []
    for new in (step.new, NewKV(k_TGD, v_TGD)):
        outs.append(torch.zeros_like(step.q_THD))
        backend.forward(plan, step.kv, step.q_THD.clone(), outs[-1], new)
    assert torch.equal(outs[0][: rows[0]], outs[1][: rows[0]])


@pytest.mark.parametrize(("case", "bounds"), CAPTURED, ids=str)
def test_lengths_on_the_device_rule(case: Case, bounds: tuple[int, int, int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_captured(partial(build, "triton"), case, bounds, device=device)


DECODES = [
    Case(rows=(1,) * len(cached), cached=cached, num_heads=8, num_kv_heads=2, seed=seed)
    for seed, cached in enumerate(((900, 3, 0), tuple(range(0, 4000, 400)), (4095,)))
]
PROMPTS = [
    Case(rows=rows, cached=cached, num_heads=8, num_kv_heads=2, head_dim=64, seed=seed)
    for seed, (rows, cached) in enumerate(
        (((300, 1, 100), (0, 700, 40)), ((1, 2, 1, 1), (0, 9, 500, 80)), ((700,), (300,)))
    )
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cases", "bounds"), [(DECODES, (12, 0, 4200)), (PROMPTS, (6, 720, 1100))], ids=["1", "many"]
)
def test_a_graph_replays_steps_of_other_lengths(
    dtype: torch.dtype, cases: list[Case], bounds: tuple[int, int, int]
) -> None:
    """Captured with one step's lengths and pages, replayed with others'."""
    steps = [as_captured(make_step(case, dtype, torch.device("cuda")), *bounds) for case in cases]
    most_pages = max(step.kv.k_NPGD.shape[0] for step in steps)

    def inputs(step: Step) -> list[torch.Tensor]:
        batch = step.batch
        pages = most_pages - step.kv.k_NPGD.shape[0]
        caches = [
            torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, 0, 0, pages), value=torch.nan)
            for cache in (step.kv.k_NPGD, step.kv.v_NPGD)
        ]
        on_device = (batch.query_starts_S1, batch.context_lens_S, batch.page_table_SM)
        return [*on_device, step.q_THD, step.new.k_TGD, step.new.v_TGD, *caches]

    static = [x.clone() for x in inputs(steps[0])]
    starts_S1, lens_S, table_SM, q_THD, k_TGD, v_TGD, k_NPGD, v_NPGD = static
    old = steps[0].batch
    batch = SequenceBatch(old.query_lens, old.context_lens, starts_S1, lens_S, table_SM)
    backend = build("triton", steps[0].spec)
    out_THD = torch.empty_like(q_THD)

    def run() -> None:
        plan = backend.plan(batch)
        for _ in range(2):
            backend.forward(plan, LayerKV(k_NPGD, v_NPGD), q_THD, out_THD, NewKV(k_TGD, v_TGD))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in (*steps, steps[0]):
        for target, source in zip(static, inputs(step), strict=True):
            target.copy_(source)
        out_THD.fill_(torch.nan)
        graph.replay()
        assert_close(out_THD, step.expected_THD, TOLERANCE[dtype])
