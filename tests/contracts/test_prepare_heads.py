"""What prepare_heads must do on every set of operations: agree with norms, rotation and stores in
float64, and leave rows of padding out of the cache. Shape legend: see core.interfaces.ops."""

import pytest
import torch
from torch import Tensor

from core.interfaces.attention import HeadTransform, LayerKV
from core.interfaces.ops import Ops
from tests.contracts.test_ops import ORACLE, SETS, TOLERANCE, _cos_sin, normal

each_set = pytest.mark.parametrize(
    ("ops", "device", "captures"),
    [(make(), device, name != "cpu") for name, make, device in SETS],
    ids=[s[0] for s in SETS],
)


# Rows, rows of padding after them, query heads, KV heads, head dimension, page size.
CASES = [
    (0, 0, 2, 1, 4, 4),
    (1, 0, 9, 3, 64, 16),
    (7, 2, 3, 3, 80, 1),
    (4, 0, 8, 1, 96, 64),
    (5, 3, 32, 4, 128, 16),
    (3, 0, 1, 1, 2, 5),
]


def relative(result: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((result.cpu().double() - expected).norm() / expected.norm())


@each_set
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_prepare_heads(
    ops: Ops,
    device: torch.device,
    captures: bool,
    dtype: torch.dtype,
    case: tuple[int, ...],
    normed: bool,
    skips: bool,
) -> None:
    rows, padding, num_heads, num_kv_heads, head_dim, page_size = case
    if skips and not captures:
        return  # only captured steps have negative slots
    qkv_TFD = normal(1, rows + padding, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    norms = [normal(seed, head_dim, dtype=dtype) for seed in (2, 3)] if normed else [None, None]
    cos_sin_CD = _cos_sin(50, head_dim)
    positions_T = torch.randperm(50, generator=torch.Generator().manual_seed(4))[: rows + padding]
    num_pages = 40 // page_size + 1
    caches = [
        normal(seed, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype) for seed in (5, 6)
    ]
    generator = torch.Generator().manual_seed(7)
    slots_T = torch.randperm(num_pages * page_size, generator=generator)[:rows]
    if skips:
        slots_T[1::3] = -1

    def on(place: torch.device, wide: bool) -> tuple[HeadTransform, LayerKV, Tensor]:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else (x.double() if wide else x.clone()).to(place)

        q_norm, k_norm = (move(norm) for norm in norms)
        table = cos_sin_CD.to(place)
        heads = HeadTransform(num_kv_heads, table.double() if wide else table, q_norm, k_norm, 1e-4)
        moved = [move(x) for x in (*caches, qkv_TFD)]
        assert moved[0] is not None
        assert moved[1] is not None
        assert moved[2] is not None
        return heads, LayerKV(moved[0], moved[1]), moved[2]

    heads, expected_cache, qkv = on(torch.device("cpu"), True)
    expected = ORACLE.prepare_heads(qkv, heads, positions_T, expected_cache, slots_T)
    heads, cache, qkv = on(device, False)
    result = ops.prepare_heads(qkv, heads, positions_T.to(device), cache, slots_T.to(device))
    real_R = (slots_T >= 0).nonzero()[:, 0]
    for name, part, right in zip("qkv", result, expected, strict=True):
        assert part.shape == right.shape, name
        assert part.dtype == dtype, name
        assert relative(part.cpu()[real_R], right[real_R]) <= 2 * TOLERANCE[dtype], name
    stored = slots_T[real_R]
    for name in ("k_NPGD", "v_NPGD"):
        after = getattr(cache, name).cpu().flatten(0, 1)
        right = getattr(expected_cache, name).flatten(0, 1)
        assert relative(after[stored], right[stored]) <= 2 * TOLERANCE[dtype], name
        others = torch.ones(after.shape[0], dtype=torch.bool)
        others[stored] = False
        before = caches[name == "v_NPGD"].flatten(0, 1)
        assert torch.equal(after[others], before[others]), name


def test_the_oracle_stores_what_it_returns() -> None:
    qkv_TFD = normal(1, 3, 5, 8, dtype=torch.float32)
    cache = LayerKV(*(torch.zeros(2, 4, 1, 8) for _ in range(2)))
    heads = HeadTransform(1, _cos_sin(9, 8), None, None, 0.0)
    slots_T = torch.tensor([6, -1, 0])
    q, k, v = ORACLE.prepare_heads(qkv_TFD, heads, torch.tensor([0, 3, 8]), cache, slots_T)
    assert q.shape == (3, 3, 8)
    assert torch.equal(cache.k_NPGD[1, 2], k[0])
    assert torch.equal(cache.k_NPGD[0, 0], k[2])
    assert torch.equal(cache.v_NPGD[1, 2], v[0])
    assert cache.k_NPGD.flatten(1).count_nonzero() == 16
    torch.testing.assert_close(k[0], qkv_TFD[0, 3:4])  # position 0 turns nothing
