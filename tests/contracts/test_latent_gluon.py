"""The Gluon kernel of absorbed latent attention agrees with plain float64, on a Hopper GPU.

Gluon kernels run in no interpreter, so that there is nothing to test elsewhere. Contexts stand
where tiles and programs' splits begin and end; unused slots hold NaN.
"""

import random

import pytest
import torch

from core.interfaces.attention import SequenceBatch
from core.testing.latent_attention import V3, Case, Step, assert_close, check_captured, make_step
from plugins.attention._triton_latent.backend import TritonLatentBackend
from plugins.attention._triton_latent.portable import PortableKernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
TOLERANCE = 1e-2


def lengths(count: int, longest: int) -> tuple[int, ...]:
    source = random.Random(longest)
    return tuple(source.randint(0, longest) for _ in range(count))


def make(cached: tuple[int, ...], num_heads: int = 128, page_size: int = 64) -> Step:
    case = Case(
        rows=(1,) * len(cached),
        cached=cached,
        page_size=page_size,
        num_heads=num_heads,
        dims=V3,
    )
    return make_step(case, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("cached", "num_heads", "page_size"),
    [
        ((0,), 64, 64),
        ((63,), 128, 64),
        ((64,), 128, 64),
        ((0, 62, 63, 64, 126, 127, 999, 4095), 64, 64),
        (lengths(9, 300), 192, 64),
        (lengths(5, 500), 64, 128),
        ((100,) * 550, 128, 64),  # equally long: programs end with them
    ],
    ids=str,
)
def test_equals_float64(cached: tuple[int, ...], num_heads: int, page_size: int) -> None:
    step = make(cached, num_heads, page_size)
    backend = TritonLatentBackend(step.spec)
    assert not isinstance(backend.absorbed_attention.kernel, PortableKernel)
    plan = backend.plan(step.batch)
    for _ in range(2):
        out_THC = step.q_THZ.new_full(step.expected_THC.shape, torch.nan)
        backend.absorbed(plan, step.cache_BPZ, *step.queries, out_THC)
        assert_close(out_THC, step.expected_THC, TOLERANCE)


@pytest.mark.parametrize("padding", [1, 200])
def test_padding_becomes_zero(padding: int) -> None:
    check_captured(TritonLatentBackend, make(lengths(4, 300), 64), TOLERANCE, padding)


def test_replays_follow_the_lengths_on_the_device() -> None:
    """One graph, captured over short contexts, then replayed over the real ones."""
    step = make(lengths(6, 400), 64)
    real_lens_S = step.batch.context_lens_S
    lens_S = torch.ones_like(real_lens_S)
    bounds = [step.spec.max_context_tokens] * len(lens_S)
    batch = SequenceBatch(
        step.batch.query_lens,
        bounds,
        step.batch.query_starts_S1,
        lens_S,
        step.batch.page_table_SM,
    )
    backend = TritonLatentBackend(step.spec)
    out_THC = step.q_THZ.new_full(step.expected_THC.shape, torch.nan)

    queries = step.queries

    def attend() -> None:
        backend.absorbed(backend.plan(batch), step.cache_BPZ, *queries, out_THC)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    lens_S.copy_(real_lens_S)
    out_THC.fill_(torch.nan)
    graph.replay()
    assert_close(out_THC, step.expected_THC, TOLERANCE)


@pytest.mark.parametrize(("num_heads", "page_size"), [(16, 64), (96, 64), (128, 16)], ids=str)
def test_other_shapes_take_the_portable_kernel(num_heads: int, page_size: int) -> None:
    step = make((3, 70), num_heads, page_size)
    kernel = TritonLatentBackend(step.spec).absorbed_attention.kernel
    assert isinstance(kernel, PortableKernel)
