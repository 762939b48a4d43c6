"""The contract of attention plugins: agree with plain float64 attention over paged steps.

    from core.testing.attention import CASES, check_backend

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(case):
        check_backend(lambda spec: AcmeAttention(AcmeOptions(), spec), case)

Unused slots of the pool, the scratch page included, hold NaN: a backend that lets them reach its
result fails. Shape legend: see core.interfaces.attention.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from core.interfaces.attention import (
    AttentionBackend,
    AttentionSpec,
    LayerKV,
    NewKV,
    SequenceBatch,
)

MakeBackend = Callable[[AttentionSpec], AttentionBackend]
CPU = torch.device("cpu")
# Of the norm of a row's difference, over that of the row.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one step; `cached` counts the tokens before the new rows of each sequence."""

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    page_size: int = 16
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 16
    seed: int = 0

    def __str__(self) -> str:
        lengths = "+".join(
            f"{c}:{r}" for c, r in list(zip(self.cached, self.rows, strict=True))[:4]
        )
        return (
            f"p{self.page_size}-h{self.num_heads}/{self.num_kv_heads}-d{self.head_dim}-"
            f"{lengths}-s{self.seed}"
        )


PREFILL = [
    Case(rows=(1,), cached=(0,)),
    Case(rows=(5,), cached=(0,), page_size=1),
    Case(rows=(33, 2, 1), cached=(0, 0, 0), page_size=16),
    Case(rows=(17, 1, 40), cached=(31, 64, 0), page_size=16, num_heads=4, num_kv_heads=1),
    Case(rows=(9, 70), cached=(3, 128), page_size=64, num_heads=8, num_kv_heads=1),
    Case(rows=(20, 3), cached=(0, 100), page_size=5, num_heads=6, num_kv_heads=2, head_dim=80),
    Case(rows=(16, 16), cached=(16, 0), num_heads=2, num_kv_heads=2, head_dim=64),
]
DECODE = [
    Case(rows=(1,), cached=(0,)),
    Case(rows=(1, 1, 1), cached=(0, 15, 16), page_size=16),
    Case(rows=(1, 1, 1, 1), cached=(3, 200, 64, 63), page_size=64, num_heads=4, num_kv_heads=1),
    Case(rows=(1, 1), cached=(300, 2), page_size=1, num_heads=8, num_kv_heads=1),
    Case(rows=(1, 1), cached=(70, 33), page_size=5, num_heads=6, num_kv_heads=2, head_dim=80),
    Case(rows=(1, 1), cached=(40, 90), page_size=16, num_heads=2, num_kv_heads=2, head_dim=64),
]
LARGE = [
    Case(rows=(300, 700), cached=(0, 513), page_size=64, num_heads=9, num_kv_heads=3, head_dim=64),
    Case(rows=(257, 1, 256), cached=(1, 900, 256), num_heads=9, num_kv_heads=3, head_dim=64),
    Case(rows=(1,) * 24, cached=tuple(range(0, 2400, 100)), num_heads=9, num_kv_heads=3),
    Case(rows=(40, 60), cached=(100, 0), num_heads=8, num_kv_heads=2, head_dim=128, page_size=128),
    Case(rows=(1, 1), cached=(500, 1000), num_heads=4, num_kv_heads=1, head_dim=256),
    Case(rows=(50,), cached=(77,), num_heads=4, num_kv_heads=4, head_dim=96),
    Case(rows=(200, 65, 129), cached=(0, 130, 0), num_heads=8, num_kv_heads=2, head_dim=128),
]


def random_cases(count: int) -> Iterator[Case]:
    """Mixed lengths; every other case decodes."""
    source = random.Random(7)
    for seed in range(count):
        size = source.randint(1, 6)
        num_kv_heads = source.choice((1, 2, 3))
        yield Case(
            rows=tuple(1 if seed % 2 else source.randint(1, 50) for _ in range(size)),
            cached=tuple(source.choice((0, source.randint(1, 180))) for _ in range(size)),
            page_size=source.choice((1, 3, 16, 64)),
            num_heads=num_kv_heads * source.choice((1, 3, 4, 8)),
            num_kv_heads=num_kv_heads,
            head_dim=source.choice((16, 24, 64)),
            seed=seed,
        )


CASES = list(dict.fromkeys([*PREFILL, *DECODE, *LARGE, *random_cases(24)]))

# Steps of `check_captured` and the bounds of the capture: (sequences, rows, tokens); 0 rows: of
# decodes alone. The last but one fills them exactly.
CAPTURED = [
    (Case(rows=(1, 1, 1), cached=(0, 200, 64), num_heads=4), (5, 0, 260)),
    (Case(rows=(1,) * 5, cached=(0, 9, 80, 3, 47), num_heads=6, num_kv_heads=2), (300, 0, 181)),
    (Case(rows=(7, 40, 1), cached=(0, 31, 64), page_size=5, num_heads=6), (6, 100, 90)),
    (Case(rows=(64, 1), cached=(0, 0), num_heads=8, head_dim=64), (9, 77, 400)),
    (Case(rows=(30, 30), cached=(0, 5), num_heads=4), (2, 60, 35)),
    # Decodes alone in a step that was captured for prompts, which another rank has.
    (Case(rows=(1, 1, 1), cached=(0, 200, 64), num_heads=4, head_dim=64), (5, 70, 260)),
]


@dataclass(frozen=True)
class Step:
    """What a backend is given, and the answer."""

    spec: AttentionSpec
    batch: SequenceBatch
    kv: LayerKV
    new: NewKV
    q_THD: Tensor
    expected_THD: Tensor  # float64, on the CPU


def make_step(case: Case, dtype: torch.dtype, device: torch.device) -> Step:
    """A step over a pool whose pages are permuted and where all unused slots hold NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    context_lens = [c + r for c, r in zip(case.cached, case.rows, strict=True)]
    page_counts = [-(-length // case.page_size) for length in context_lens]
    num_pages = sum(page_counts) + 3
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # never page 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kv_shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    k_NPGD, v_NPGD = (torch.full(kv_shape, torch.nan, dtype=dtype) for _ in range(2))
    new = []
    page_table_SM = torch.zeros(len(case.rows), max(page_counts) + 2, dtype=torch.int32)
    q_THD = normal(sum(case.rows), case.num_heads, case.head_dim)
    expected = []
    start = 0
    for index, (rows, length) in enumerate(zip(case.rows, context_lens, strict=True)):
        pages = [order.pop() for _ in range(page_counts[index])]
        page_table_SM[index, : len(pages)] = torch.tensor(pages)
        k_CGD, v_CGD = (normal(length, case.num_kv_heads, case.head_dim) for _ in range(2))
        for token in range(length):
            place = pages[token // case.page_size], token % case.page_size
            k_NPGD[place], v_NPGD[place] = k_CGD[token], v_CGD[token]
        new.append((k_CGD[length - rows :], v_CGD[length - rows :]))
        expected.append(attend(q_THD[start : start + rows], k_CGD, v_CGD))
        start += rows
    starts = list(accumulate(case.rows, initial=0))
    spec = AttentionSpec(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        page_size=case.page_size,
        dtype=dtype,
        device=device,
        max_context_tokens=max(context_lens) + 7,
    )
    batch = SequenceBatch(
        list(case.rows),
        context_lens,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        page_table_SM.to(device),
    )
    kv = LayerKV(k_NPGD.to(device), v_NPGD.to(device))
    k_TGD, v_TGD = (torch.cat(part).to(device) for part in zip(*new, strict=True))
    return Step(spec, batch, kv, NewKV(k_TGD, v_TGD), q_THD.to(device), torch.cat(expected))


def as_captured(step: Step, num_sequences: int, num_rows: int, num_tokens: int) -> Step:
    """The same step as a CUDA graph sees it that was captured for bounds which it does not reach:
    more sequences, which are padding, more rows (0: of decodes alone), longer contexts."""
    batch, old = step.batch, len(step.batch.query_lens)
    device = batch.query_starts_S1.device
    more = num_sequences - old
    decodes = num_rows == 0
    num_rows = num_sequences if decodes else num_rows
    last = batch.query_starts_S1[-1:].expand(more)
    pages = batch.page_table_SM
    columns = -(-num_tokens // step.spec.page_size) - pages.shape[1]
    table_SM = torch.nn.functional.pad(pages, (0, max(columns, 0), 0, more))
    captured = SequenceBatch(
        [1] * num_sequences if decodes else [num_rows // num_sequences + 1] * num_sequences,
        [num_tokens] * num_sequences,
        torch.cat((batch.query_starts_S1, last)),
        torch.cat((batch.context_lens_S, torch.zeros(more, dtype=torch.int32, device=device))),
        table_SM,
    )
    rows = num_rows - step.q_THD.shape[0]

    def padded(x: Tensor) -> Tensor:
        return torch.cat((x, x[:1].expand(rows, -1, -1)))

    expected_THD = torch.nn.functional.pad(step.expected_THD, (0, 0, 0, 0, 0, rows))
    new = NewKV(padded(step.new.k_TGD), padded(step.new.v_TGD))
    return Step(step.spec, captured, step.kv, new, padded(step.q_THD), expected_THD)


def attend(q_QHD: Tensor, k_CGD: Tensor, v_CGD: Tensor) -> Tensor:
    """Attention of the last Q tokens of one sequence, one row and head at a time."""
    num_rows, num_heads, head_dim = q_QHD.shape
    num_cached, num_kv_heads, _ = k_CGD.shape
    q_QHD, k_CGD, v_CGD = q_QHD.double(), k_CGD.double(), v_CGD.double()
    out_QHD = torch.empty_like(q_QHD)
    for row in range(num_rows):
        seen = num_cached - num_rows + row + 1
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores_C = k_CGD[:seen, kv_head] @ q_QHD[row, head] * head_dim**-0.5
            out_QHD[row, head] = scores_C.softmax(0) @ v_CGD[:seen, kv_head]
    return out_QHD


def another_layer(step: Step) -> Step:
    """The same pages with other contents: keys and queries have the other sign and values are
    doubled, so that the scores are the same and the answers doubled, exactly."""
    return replace(
        step,
        kv=LayerKV(-step.kv.k_NPGD, 2 * step.kv.v_NPGD),
        new=NewKV(-step.new.k_TGD, 2 * step.new.v_TGD),
        q_THD=-step.q_THD,
        expected_THD=2 * step.expected_THD,
    )


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
    here = rows.to(device)
    return replace(
        other,
        batch=reversed_batch,
        new=NewKV(other.new.k_TGD[here], other.new.v_TGD[here]),
        q_THD=other.q_THD[here],
        expected_THD=other.expected_THD[rows],
    )


def check_backend(
    make: MakeBackend,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tolerance: float | None = None,
) -> None:
    """Build a backend for a case's step, and compare it with float64 attention: two layers of one
    plan, then one of the next step. `tolerance`: None: `TOLERANCE` of the dtype. Raises
    AssertionError."""
    step = make_step(case, dtype, device)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    backend = make(step.spec)
    check_layers(backend, [step, another_layer(step)], tolerance)
    check_layers(backend, [next_step(step)], tolerance)


def check_captured(
    make: MakeBackend,
    case: Case,
    bounds: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tolerance: float | None = None,
) -> None:
    """For backends that say they are `capturable`: a case of `CAPTURED` as a CUDA graph sees it,
    with lengths on the device alone. Raises AssertionError."""
    step = as_captured(make_step(case, dtype, device), *bounds)
    assert make(step.spec).capturable
    check_step(make, step, TOLERANCE[dtype] if tolerance is None else tolerance)


def check_step(make: MakeBackend, step: Step, tolerance: float) -> None:
    """Two layers of one step, by the norm of each row."""
    check_layers(make(step.spec), [step, another_layer(step)], tolerance)


def check_layers(backend: AttentionBackend, layers: list[Step], tolerance: float) -> None:
    """Layers of one step, which have a batch in common, by one plan."""
    plan = backend.plan(layers[0].batch)
    for step in layers:
        out_THD = torch.full_like(step.q_THD, torch.nan)
        backend.forward(plan, step.kv, step.q_THD.clone(), out_THD, step.new)
        assert_close(out_THD, step.expected_THD, tolerance)


def assert_close(out_THD: Tensor, expected_THD: Tensor, tolerance: float) -> None:
    """By norm of each row; rows that are padding must be zero."""
    error_T = (out_THD.cpu().double() - expected_THD).flatten(1).norm(dim=1)
    size_T = expected_THD.flatten(1).norm(dim=1)
    assert torch.all(error_T <= tolerance * size_T), error_T / size_T
