"""What prepare_heads must do on every set of operations: agree with norms, rotation and stores in
float64, and leave rows of padding out of the cache. Shape legend: see core.interfaces.ops."""

import pytest
import torch
from torch import Tensor

from core.interfaces.attention import HeadTransform, LayerKV
from core.interfaces.ops import Ops
from tests.contracts import plain_ops
from tests.contracts.test_ops import TOLERANCE, _cos_sin, normal, params_of

EPS = 1e-4
# Rows, rows of padding after them, query heads, KV heads, head dimension, values of a head that
# turn, page size.
CASES = [
    (0, 0, 2, 1, 4, 4, 4),
    (1, 0, 9, 3, 64, 64, 16),
    (7, 2, 3, 3, 80, 80, 1),
    (4, 0, 8, 1, 96, 96, 64),
    (5, 3, 32, 4, 128, 128, 16),
    (3, 0, 1, 1, 2, 2, 5),
    (5, 1, 12, 1, 128, 64, 16),
    (4, 0, 3, 2, 80, 20, 4),
    (3, 2, 5, 2, 10, 8, 4),
]


def relative(result: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((result.cpu().double() - expected).norm() / expected.norm())


def expected_heads(
    qkv_TFD: Tensor,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    cos_sin_CR: Tensor,
    positions_T: Tensor,
) -> list[Tensor]:
    """q and k, normed and turned, and v as it is."""
    num_heads = qkv_TFD.shape[1] - 2 * num_kv_heads
    q_THD, k_TGD, v_TGD = qkv_TFD.double().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q_THD, k_TGD = (
            plain_ops.rms_norm(x, norm, EPS) for x, norm in zip((q_THD, k_TGD), norms, strict=True)
        )
    return [*(plain_ops.rope(x, cos_sin_CR, positions_T) for x in (q_THD, k_TGD)), v_TGD]


# Only captured steps have rows without a slot, and a CPU captures none.
SKIPS = {"no padding inside": lambda name: False, "padding inside": lambda name: True}
PARAMS = [
    pytest.param(*param.values, id=f"{param.id}-{what}", marks=param.marks)
    for what, skips in SKIPS.items()
    for param in params_of(skips)
    if (param.id, what) != ("cpu", "padding inside")
]


@pytest.mark.parametrize(("ops", "device", "skips"), PARAMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_prepare_heads(
    ops: Ops,
    device: torch.device,
    skips: bool,
    dtype: torch.dtype,
    case: tuple[int, ...],
    normed: bool,
) -> None:
    rows, padding, num_heads, num_kv_heads, head_dim, turned, page_size = case
    qkv_TFD = normal(1, rows + padding, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    norms = (normal(2, head_dim, dtype=dtype), normal(3, head_dim, dtype=dtype)) if normed else None
    cos_sin_CR = _cos_sin(50, turned)
    positions_T = torch.randperm(50, generator=torch.Generator().manual_seed(4))[: rows + padding]
    num_pages = 40 // page_size + 1
    caches = [
        normal(seed, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype) for seed in (5, 6)
    ]
    generator = torch.Generator().manual_seed(7)
    slots_T = torch.randperm(num_pages * page_size, generator=generator)[:rows]
    if skips:
        slots_T[1::3] = -1
    expected = expected_heads(qkv_TFD, num_kv_heads, norms, cos_sin_CR, positions_T)
    q_norm, k_norm = (None, None) if norms is None else (norm.to(device) for norm in norms)
    cache = LayerKV(*(x.clone().to(device) for x in caches))
    result = ops.prepare_heads(
        qkv_TFD.clone().to(device),
        HeadTransform(num_kv_heads, cos_sin_CR.to(device), q_norm, k_norm, EPS),
        positions_T.to(device),
        cache,
        slots_T.to(device),
    )
    real_R = (slots_T >= 0).nonzero()[:, 0]
    for name, part, right in zip("qkv", result, expected, strict=True):
        assert part.shape == right.shape, name
        assert part.dtype == dtype, name
        assert relative(part.cpu()[real_R], right[real_R]) <= 2 * TOLERANCE[dtype], name
    stored = slots_T[real_R]
    for after, before, right in zip(
        (cache.k_NPGD, cache.v_NPGD), caches, expected[1:], strict=True
    ):
        after = after.cpu().flatten(0, 1)
        assert relative(after[stored], right[real_R]) <= 2 * TOLERANCE[dtype]
        others = torch.ones(after.shape[0], dtype=torch.bool)
        others[stored] = False
        assert torch.equal(after[others], before.flatten(0, 1)[others])
