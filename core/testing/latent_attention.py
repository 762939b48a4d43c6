"""The contract of latent attention plugins: agree with plain float64 attention over paged steps.

    from core.testing.latent_attention import CASES, check_backend

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(case):
        check_backend(lambda spec: AcmeLatent(AcmeOptions(), spec), case)

In both forms. Unused slots of the pool, the scratch page included, hold NaN: a backend that lets
them reach its result fails. Shape legend: see core.interfaces.latent_attention.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionBackend, LatentAttentionSpec

MakeBackend = Callable[[LatentAttentionSpec], LatentAttentionBackend]
CPU = torch.device("cpu")
# Of the norm of a row's difference, over that of the row.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
V3 = (128, 64, 128, 512)  # N, R, V, C of DeepSeek-V3
ODD = (20, 12, 40, 24)  # no powers of two, values wider than keys


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one step; `cached` counts the tokens before the new rows of each sequence."""

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    page_size: int = 16
    num_heads: int = 3
    dims: tuple[int, int, int, int] = (16, 8, 16, 32)  # N, R, V, C
    seed: int = 0

    def __str__(self) -> str:
        pairs = list(zip(self.cached, self.rows, strict=True))[:4]
        lengths = "+".join(f"{c}:{r}" for c, r in pairs)
        dims = "-".join(str(dim) for dim in self.dims)
        return f"p{self.page_size}-h{self.num_heads}-d{dims}-{lengths}-s{self.seed}"


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


CASES = [*SMALL, *LARGE, *random_cases(16)]


@dataclass(frozen=True)
class Step:
    """What a backend is given, and both answers (float64, on the CPU)."""

    spec: LatentAttentionSpec
    batch: SequenceBatch
    cache_BPZ: Tensor
    q_THD: Tensor
    q_THZ: Tensor
    key_HNC: Tensor
    value_HVC: Tensor
    expected_THC: Tensor
    expected_THV: Tensor
    expanded_tokens: list[int] = field(default_factory=list)  # of each call of `expand`

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """(q_THC, q_THR) of the absorbed form; the rotary part lies in wider rows, as after its
        projection."""
        return split_queries(self.spec, self.q_THZ)

    def expand(self, cached_XZ: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of the cache, and strided, as a model's are."""
        self.expanded_tokens.append(cached_XZ.shape[0])
        return expand(cached_XZ, self.key_HNC, self.value_HVC)


def split_queries(spec: LatentAttentionSpec, q_THZ: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts, new tensors: latents contiguous, rotary parts behind as many others."""
    q_THC, q_THR = torch.split(q_THZ, [spec.latent_dim, spec.rope_dim], dim=2)
    wide_THX = torch.cat((q_THZ.new_full((*q_THZ.shape[:2], spec.nope_dim), torch.nan), q_THR), 2)
    return q_THC.contiguous(), wide_THX[..., spec.nope_dim :]


def expand(cached_XZ: Tensor, key_HNC: Tensor, value_HVC: Tensor) -> tuple[Tensor, Tensor]:
    """Non-rotary keys (X, H, N) and values (X, H, V)."""
    num_heads, nope_dim, rank = key_HNC.shape
    weight_OC = torch.cat((key_HNC, value_HVC), dim=1).flatten(0, 1)
    kv_XHY = (cached_XZ[:, :rank] @ weight_OC.T).view(len(cached_XZ), num_heads, -1)
    return kv_XHY[..., :nope_dim], kv_XHY[..., nope_dim:]


def make_step(case: Case, dtype: torch.dtype, device: torch.device) -> Step:
    """A step over a pool whose pages are permuted and where all unused slots hold NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    nope_dim, rope_dim, value_dim, latent_dim = case.dims
    context_lens = [c + r for c, r in zip(case.cached, case.rows, strict=True)]
    page_counts = [-(-length // case.page_size) for length in context_lens]
    num_pages, num_rows = sum(page_counts) + 3, sum(case.rows)
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # never page 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    scale = (nope_dim + rope_dim) ** -0.5
    key_HNC = normal(case.num_heads, nope_dim, latent_dim) * latent_dim**-0.5
    value_HVC = normal(case.num_heads, value_dim, latent_dim) * latent_dim**-0.5
    # Heads lie in wider rows, as after a merged projection.
    wide_TX = normal(num_rows, case.num_heads * (nope_dim + rope_dim) + 8)
    q_THD = wide_TX[:, 8:].view(num_rows, case.num_heads, -1)
    q_THZ = normal(num_rows, case.num_heads, latent_dim + rope_dim)
    cache_shape = (num_pages, case.page_size, latent_dim + rope_dim)
    cache_BPZ = torch.full(cache_shape, torch.nan, dtype=dtype)
    page_table_SM = torch.zeros(len(case.rows), max(page_counts) + 2, dtype=torch.int32)
    absorbed, expanded = [], []
    start = 0
    for index, (rows, length) in enumerate(zip(case.rows, context_lens, strict=True)):
        pages = [order.pop() for _ in range(page_counts[index])]
        page_table_SM[index, : len(pages)] = torch.tensor(pages)
        cached_XZ = normal(length, latent_dim + rope_dim)
        for token in range(length):
            cache_BPZ[pages[token // case.page_size], token % case.page_size] = cached_XZ[token]
        own = slice(start, start + rows)
        wide_XZ = cached_XZ.double()
        one_head = wide_XZ.unsqueeze(1).expand(-1, case.num_heads, -1)
        absorbed.append(attend(q_THZ[own], one_head, one_head[..., :latent_dim], scale))
        nope_XHN, values = expand(wide_XZ, key_HNC.double(), value_HVC.double())
        keys = torch.cat((nope_XHN, one_head[..., latent_dim:]), dim=2)
        expanded.append(attend(q_THD[own], keys, values, scale))
        start += rows
    spec = LatentAttentionSpec(
        num_heads=case.num_heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        latent_dim=latent_dim,
        scale=scale,
        page_size=case.page_size,
        dtype=dtype,
        device=device,
        max_context_tokens=max(context_lens) + 7,
    )
    starts = torch.tensor(list(accumulate(case.rows, initial=0)), dtype=torch.int32)
    batch = SequenceBatch(
        list(case.rows),
        context_lens,
        starts.to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        page_table_SM.to(device),
    )
    return Step(
        spec,
        batch,
        cache_BPZ.to(device),
        q_THD.to(device),
        q_THZ.to(device),
        key_HNC.to(device),
        value_HVC.to(device),
        torch.cat(absorbed),
        torch.cat(expanded),
    )


def attend(q_QHD: Tensor, k_XHD: Tensor, v_XHV: Tensor, scale: float) -> Tensor:
    """Attention of the last Q tokens of one sequence, one row at a time."""
    num_rows, num_tokens = q_QHD.shape[0], k_XHD.shape[0]
    out = []
    for row in range(num_rows):
        seen = num_tokens - num_rows + row + 1
        scores_HX = torch.einsum("hd,xhd->hx", q_QHD[row].double(), k_XHD[:seen]) * scale
        out.append(torch.einsum("hx,xhv->hv", scores_HX.softmax(1), v_XHV[:seen]))
    return torch.stack(out)


def another_layer(step: Step) -> Step:
    """The same pages with other contents: all vectors and queries have the other sign, so that the
    scores are the same and the answers have the other sign, exactly."""
    return replace(
        step,
        cache_BPZ=-step.cache_BPZ,
        q_THD=-step.q_THD,
        q_THZ=-step.q_THZ,
        expected_THC=-step.expected_THC,
        expected_THV=-step.expected_THV,
    )


def check_backend(
    make: MakeBackend,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tolerance: float | None = None,
) -> None:
    """Build a backend for a case's step, and compare it with float64 attention: two layers of one
    plan, then one of the next step, in either form. `tolerance`: None: `TOLERANCE` of the dtype.
    Raises AssertionError."""
    step = make_step(case, dtype, device)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    backend = make(step.spec)
    check_layers(backend, [step, another_layer(step)], tolerance)
    check_layers(backend, [next_step(step)], tolerance)


def check_step(make: MakeBackend, step: Step, tolerance: float) -> None:
    """Two layers of one step, in either form."""
    check_layers(make(step.spec), [step, another_layer(step)], tolerance)


def check_layers(backend: LatentAttentionBackend, layers: list[Step], tolerance: float) -> None:
    """Layers of one step, which have a batch in common, by one plan."""
    plan = backend.plan(layers[0].batch)
    for step in layers:
        out_THC = step.q_THZ.new_full(step.expected_THC.shape, torch.nan)
        backend.absorbed(plan, step.cache_BPZ, *step.queries, out_THC)
        assert_close(out_THC, step.expected_THC, tolerance)
        out_THV = step.q_THD.new_full(step.expected_THV.shape, torch.nan)
        backend.expanded(plan, step.cache_BPZ, step.q_THD.clone(), step.expand, out_THV)
        assert_close(out_THV, step.expected_THV, tolerance)


def next_step(step: Step) -> Step:
    """The sequences in the opposite order, over pages with other contents: nothing that a backend
    remembers of the step before is right in it."""
    batch, other = step.batch, another_layer(step)
    order = list(reversed(range(len(batch.query_lens))))
    query_lens = [batch.query_lens[s] for s in order]
    starts = list(accumulate(batch.query_lens, initial=0))
    rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order])
    device = step.spec.device
    reversed_batch = SequenceBatch(
        query_lens,
        [batch.context_lens[s] for s in order],
        torch.tensor(list(accumulate(query_lens, initial=0)), dtype=torch.int32, device=device),
        batch.context_lens_S.flip(0),
        batch.page_table_SM.flip(0),
    )
    on_device = rows.to(device)
    return replace(
        other,
        batch=reversed_batch,
        q_THD=other.q_THD[on_device],
        q_THZ=other.q_THZ[on_device],
        expected_THC=other.expected_THC[rows],
        expected_THV=other.expected_THV[rows],
    )


def check_parts(make: MakeBackend, step: Step, tolerance: float, most_tokens: int) -> None:
    """The expanded form of a backend that is to expand at most `most_tokens` tokens at a time, each
    token once: its memory must not grow with the context."""
    backend = make(step.spec)
    step.expanded_tokens.clear()
    out_THV = step.q_THD.new_full(step.expected_THV.shape, torch.nan)
    plan = backend.plan(step.batch)
    backend.expanded(plan, step.cache_BPZ, step.q_THD.clone(), step.expand, out_THV)
    assert_close(out_THV, step.expected_THV, tolerance)
    assert sum(step.expanded_tokens) == sum(step.batch.context_lens), "tokens were expanded again"
    assert max(step.expanded_tokens) <= most_tokens, "too many tokens were expanded at once"


def check_captured(make: MakeBackend, step: Step, tolerance: float, padding: int) -> None:
    """The absorbed form of a backend that says it is `capturable`, in a step of decodes as a CUDA
    graph sees it: the host knows bounds, and the last `padding` sequences are padding, whose rows
    must become zero."""
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
    backend = make(step.spec)
    assert backend.capturable
    queries = split_queries(step.spec, q_THZ)
    backend.absorbed(backend.plan(padded), step.cache_BPZ, *queries, out_THC)
    assert_close(out_THC[:rows], step.expected_THC, tolerance)
    assert not out_THC[rows:].any(), "rows that are padding must be zero"


def assert_close(out: Tensor, expected: Tensor, tolerance: float) -> None:
    """By norm of each row; NaN never passes."""
    error_TX = (out.cpu().double() - expected).flatten(1)
    relative_T = error_TX.norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert relative_T.max().item() <= tolerance, relative_T
