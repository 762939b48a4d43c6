"""What every set of operations must do: agree with plain formulas in float64 (plain_ops.py).

Triton's kernels run in its interpreter where there is no GPU. Shape legend: see
core.interfaces.ops.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core.devices.cpu import cpu_ops
from core.devices.cpu.cpu_ops import CpuOps
from core.devices.cuda.triton_ops import TritonOps
from core.interfaces.latent_attention import LatentTransform
from core.interfaces.ops import Ops
from core.ops.torch_ops import TorchOps
from tests.contracts import plain_ops

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETS: list[tuple[str, Callable[[], Ops], torch.device]] = [
    ("torch", TorchOps, CPU),
    ("cpu", CpuOps, CPU),
]
if torch.cuda.is_available():
    SETS += [("torch-cuda", TorchOps, GPU), ("triton-cuda", TritonOps, GPU)]
else:
    SETS.append(("triton-interpreted", TritonOps, CPU))

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def params_of(*more: Callable[[str], object]) -> list[Any]:
    """Sets as parameters, each with what `more` says of its name. The interpreter is slow, so that
    `make test` takes pairs of a test's other parameters there."""
    return [
        pytest.param(
            make(), device, *(say(name) for say in more), id=name,
            marks=pytest.mark.pairwise if "interpreted" in name else (),
        )
        for name, make, device in SETS
    ]  # fmt: skip


each_set = pytest.mark.parametrize(("ops", "device"), params_of())
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random values every dtype of the test can hold, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """By norm, so that a single wrong element among small ones shows; NaN never passes."""
    assert result.dtype == dtype
    assert result.shape == expected.shape
    if expected.numel() == 0:
        return
    error = (result.cpu().double() - expected).norm() / expected.norm()
    assert error.item() <= TOLERANCE[dtype]


@each_set
@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 5), (33, 576), (96, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    outputs: int,
    inputs: int,
    biased: bool,
) -> None:
    weight_OI = normal(1, outputs, inputs, dtype=dtype)
    bias_O = normal(2, outputs, dtype=dtype) if biased else None
    x_TI = normal(3, rows, inputs, dtype=dtype)
    kernel = ops.linear(weight_OI.to(device), None if bias_O is None else bias_O.to(device))
    close(kernel(x_TI.to(device)), plain_ops.linear(x_TI, weight_OI, bias_O), dtype)
    if rows:
        wide_TX = normal(4, rows, 2 * inputs, dtype=dtype)
        part_TI = wide_TX[:, inputs:]  # rows lie apart, as after a split
        expected_TO = plain_ops.linear(part_TI, weight_OI, bias_O)
        close(kernel(wide_TX.to(device)[:, inputs:]), expected_TO, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, where interpreted
@each_set
@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
@pytest.mark.parametrize(("size", "inputs"), [(70, 8), (63, 5), (45, 576), (96, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linear(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    size: int,
    inputs: int,
    biased: bool,
) -> None:
    weight_2IE = normal(1, 2 * size, inputs, dtype=dtype)
    bias_2I = normal(2, 2 * size, dtype=dtype) if biased else None
    x_TE = normal(3, rows, inputs, dtype=dtype)
    expected_TI = plain_ops.silu_and_mul(plain_ops.linear(x_TE, weight_2IE, bias_2I))
    kernel = ops.gated_linear(
        weight_2IE.to(device), None if bias_2I is None else bias_2I.to(device)
    )
    close(kernel(x_TE.to(device)), expected_TI, dtype)


@each_set
@each_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 576), (3, 5, 80), (17, 96), (2, 1537)])
def test_rms_norm(
    ops: Ops, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = normal(1, *shape, dtype=dtype) * 0.01  # small enough that eps counts
    weight_E = normal(2, shape[-1], dtype=dtype)
    before = x.clone()
    result = ops.rms_norm(x.to(device), weight_E.to(device), 1e-4)
    close(result, plain_ops.rms_norm(x, weight_E, 1e-4), dtype)
    assert torch.equal(x, before)


@each_set
@each_dtype
def test_rms_norm_of_strided_heads_and_zeros(
    ops: Ops, device: torch.device, dtype: torch.dtype
) -> None:
    projected = normal(1, 4, 6, 16, dtype=dtype)
    weight_D = normal(2, 16, dtype=dtype)
    result = ops.rms_norm(projected.to(device)[:, 1:4], weight_D.to(device), 1e-5)
    close(result, plain_ops.rms_norm(projected[:, 1:4], weight_D, 1e-5), dtype)
    zeros = torch.zeros(2, 16, dtype=dtype, device=device)
    assert torch.equal(ops.rms_norm(zeros, weight_D.to(device), 1e-5), zeros)


@each_set
@each_dtype
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 576), (5, 96), (2, 1537)])
def test_add_rms_norm(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    shape: tuple[int, int],
) -> None:
    x_TE = normal(1, *shape, dtype=dtype)
    residual_TE = normal(2, *shape, dtype=residual_dtype or dtype)
    weight_E = normal(3, shape[-1], dtype=dtype)
    expected_TE = x_TE.double() + residual_TE.double()
    normed, total = ops.add_rms_norm(
        x_TE.to(device), residual_TE.to(device), weight_E.to(device), 1e-5
    )
    # The sum may be wider than x, but never narrower than the residual.
    assert total.dtype in (torch.promote_types(dtype, residual_TE.dtype), torch.float32)
    # Triton's interpreter truncates to bf16, so up to one unit in the last place.
    torch.testing.assert_close(
        total.cpu().double(), expected_TE, rtol=torch.finfo(total.dtype).eps, atol=1e-7
    )
    # What is normalised is that sum, as the next layer sees it.
    close(normed, plain_ops.rms_norm(total.cpu(), weight_E, 1e-5), dtype)


@each_set
@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocabulary", [5, 300])
def test_logits(
    ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int
) -> None:
    check_logits(ops, device, dtype, rows, vocabulary)


def check_logits(
    ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int
) -> None:
    weight_VE, x_RE = normal(1, vocabulary, 96, dtype=dtype), normal(2, rows, 96, dtype=dtype)
    expected_RV = plain_ops.linear(x_RE, weight_VE)
    result_RV = ops.logits(weight_VE.to(device))(x_RE.to(device)).cpu()
    assert result_RV.dtype == torch.float32
    if rows == 0:
        assert result_RV.shape == (0, vocabulary)
        return
    close(result_RV.to(dtype), expected_RV, dtype)
    # The best ones are as good as float32, whatever the weight's dtype.
    best_R5 = expected_RV.topk(5, dim=-1).indices
    torch.testing.assert_close(
        result_RV.gather(1, best_R5).double(),
        expected_RV.gather(1, best_R5).double(),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_where_the_cpu_multiplies_no_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_ops, "packs", lambda dtype: False)
    check_logits(CpuOps(), CPU, dtype, rows=5, vocabulary=300)


def _cos_sin(num_positions: int, head_dim: int) -> Tensor:
    angles = torch.arange(num_positions)[:, None] * 0.3 ** torch.arange(head_dim // 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@each_set
@each_dtype
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "head_dim", "turned"),
    [
        (0, 2, 1, 4, 4),
        (1, 9, 3, 64, 64),
        (7, 3, 3, 80, 80),
        (4, 8, 1, 96, 96),
        (3, 1, 1, 2, 2),
        # The first values of a head alone turn.
        (0, 2, 1, 4, 2),
        (5, 12, 1, 128, 64),
        (4, 3, 2, 80, 20),
        (3, 5, 2, 10, 8),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_rope(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    turned: int,
    joined: bool,
) -> None:
    split = (num_heads, num_kv_heads, num_kv_heads)
    qkv = normal(1, rows, sum(split), head_dim, dtype=dtype)
    q_THD, k_TGD, _ = qkv.split(split, dim=1)
    positions_T = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:rows]
    cos_sin_CR = _cos_sin(50, turned)
    expected = [plain_ops.rope(x, cos_sin_CR, positions_T) for x in (q_THD, k_TGD)]
    on_device = qkv.clone().to(device)
    q, k, v = on_device.split(split, dim=1)
    if not joined:
        q, k = q.contiguous(), k.contiguous()
    rotated = ops.rope(q, k, cos_sin_CR.to(device), positions_T.to(device))
    for result, right in zip(rotated, expected, strict=True):
        close(result, right, dtype)
    for result, before in zip(rotated, (q_THD, k_TGD), strict=True):
        assert torch.equal(result[..., turned:].cpu(), before[..., turned:])
    assert torch.equal(v.cpu(), qkv.split(split, dim=1)[2])  # what lies beside is untouched


@each_set
@pytest.mark.parametrize("order", ["kqv", "qvk", "vkq"])
def test_rope_of_heads_that_do_not_follow_each_other(
    ops: Ops, device: torch.device, order: str
) -> None:
    qkv = normal(1, 3, 6, 8, dtype=torch.float32)
    parts = dict(zip(order, qkv.split(2, dim=1), strict=True))
    positions_T, cos_sin_CR = torch.tensor([4, 0, 9]), _cos_sin(10, 8)
    expected = [plain_ops.rope(parts[name], cos_sin_CR, positions_T) for name in "qk"]
    moved = dict(zip(order, qkv.clone().to(device).split(2, dim=1), strict=True))
    rotated = ops.rope(moved["q"], moved["k"], cos_sin_CR.to(device), positions_T.to(device))
    for result, right in zip(rotated, expected, strict=True):
        close(result, right, torch.float32)
    assert torch.equal(moved["v"].cpu(), parts["v"])


@each_set
@each_dtype
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 1), (3, 1536), (5, 1025), (16, 100)])
def test_silu_and_mul(
    ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, size: int
) -> None:
    gate_up_T2I = normal(1, rows, 2 * size, dtype=dtype) * 4
    result = ops.silu_and_mul(gate_up_T2I.to(device))
    close(result, plain_ops.silu_and_mul(gate_up_T2I), dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, where interpreted
@each_set
@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_silu_and_mul_saturates(ops: Ops, device: torch.device, value: float) -> None:
    gate_up_T2I = torch.tensor([[value, 3.0]], device=device)
    expected = torch.tensor([[max(value, 0.0) * 3.0]])
    torch.testing.assert_close(ops.silu_and_mul(gate_up_T2I).cpu(), expected)


@each_set
@each_dtype
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("rows", "heads", "rope_dim", "rank", "page_size"),
    [(0, 2, 8, 16, 4), (1, 1, 64, 512, 1), (5, 3, 24, 40, 3), (9, 33, 64, 512, 16)],
)
def test_prepare_latent(
    ops: Ops, device: torch.device, dtype: torch.dtype,
    rows: int, heads: int, rope_dim: int, rank: int, page_size: int, interleaved: bool,
) -> None:  # fmt: skip
    q_THD = normal(1, rows, heads, 6 + rope_dim, dtype=dtype)
    wide_TX = normal(2, rows, 12 + rank + rope_dim, dtype=dtype)  # rows may lie apart
    before_BPZ = normal(5, 16, page_size, rank + rope_dim, dtype=dtype)
    norm_C = normal(3, rank, dtype=dtype)
    positions_T = torch.randint(50, (rows,), generator=torch.Generator().manual_seed(4))
    slots_T = torch.randperm(16 * page_size, generator=torch.Generator().manual_seed(6))[:rows]
    if rows > 2:  # two rows of padding: one without a place, one past the last
        slots_T = slots_T[:-1]
        slots_T[1] = -1
    cos_sin_CR = _cos_sin(50, rope_dim)
    transform = LatentTransform(norm_C.to(device), 1e-6, cos_sin_CR.to(device), interleaved)
    moved_q, moved, cache_BPZ = (x.clone().to(device) for x in (q_THD, wide_TX, before_BPZ))
    turned_THR = ops.prepare_latent(
        moved_q[..., 6:], moved[:, 12:], transform,
        positions_T.to(device), cache_BPZ, slots_T.to(device),
    )  # fmt: skip
    real_R = (slots_T >= 0).nonzero()[:, 0]
    slots_R = slots_T[real_R]
    cached_RZ = cache_BPZ.cpu().flatten(0, 1)[slots_R]
    latent_TC, k_TR = wide_TX[:, 12:].double().split((rank, rope_dim), dim=1)
    scale_T1 = torch.rsqrt(latent_TC.square().mean(1, keepdim=True) + 1e-6)
    close(cached_RZ[:, :rank], (latent_TC * scale_T1 * norm_C.double())[real_R], dtype)
    cos, sin = cos_sin_CR[positions_T].double().unsqueeze(1).chunk(2, dim=-1)
    for result, x_THR in (
        (turned_THR.cpu()[real_R], q_THD[..., 6:].double()),
        (cached_RZ[:, None, rank:], k_TR[:, None]),
    ):
        first, second = (
            (x_THR[..., 0::2], x_THR[..., 1::2]) if interleaved else x_THR.chunk(2, dim=-1)
        )
        expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        close(result, expected[real_R], dtype)
    # What lies beside is untouched.
    assert torch.equal(moved_q[..., :6].cpu(), q_THD[..., :6])
    assert torch.equal(moved[:, :12].cpu(), wide_TX[:, :12])
    after_XZ, before_XZ = cache_BPZ.cpu().flatten(0, 1), before_BPZ.flatten(0, 1)
    after_XZ[slots_R] = before_XZ[slots_R]
    assert torch.equal(after_XZ, before_XZ)


@each_set
@each_dtype
@pytest.mark.parametrize(("rows", "page_size"), [(0, 4), (1, 1), (9, 16), (5, 3)])
def test_write_kv(
    ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, page_size: int
) -> None:
    kv = normal(1, rows, 6, 24, dtype=dtype)  # q, k and v of a merged projection lie apart
    caches = [normal(seed, 8, page_size, 2, 24, dtype=dtype) for seed in (2, 3)]
    slots_T = torch.randperm(8 * page_size, generator=torch.Generator().manual_seed(4))[:rows]
    on_device = [cache.clone().to(device) for cache in caches]
    moved = kv.to(device)
    ops.write_kv(moved[:, 2:4], moved[:, 4:], *on_device, slots_T.to(device))
    for part, before, after in zip((kv[:, 2:4], kv[:, 4:]), caches, on_device, strict=True):
        expected = before.clone()
        for row, slot in enumerate(slots_T.tolist()):
            expected[slot // page_size, slot % page_size] = part[row]
        assert torch.equal(after.cpu(), expected)


@each_set
@each_dtype
@pytest.mark.parametrize(
    ("rows", "num_heads", "rope_dim"), [(0, 2, 4), (1, 16, 64), (7, 3, 6), (4, 5, 2), (3, 1, 80)]
)
def test_rope_interleaved(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    num_heads: int,
    rope_dim: int,
) -> None:
    # As in latent attention: the rotary parts are the ends of wider rows.
    q_THD = normal(1, rows, num_heads, 5 + rope_dim, dtype=dtype)
    k_TGZ = normal(2, rows, 1, 9 + rope_dim, dtype=dtype)
    positions_T = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:rows]
    cos_sin_CR = _cos_sin(50, rope_dim)
    moved_q, moved_k = q_THD.clone().to(device), k_TGZ.clone().to(device)
    rotated = ops.rope_interleaved(
        moved_q[..., 5:], moved_k[..., 9:], cos_sin_CR.to(device), positions_T.to(device)
    )
    for result, before in zip(rotated, (q_THD[..., 5:], k_TGZ[..., 9:]), strict=True):
        pairs = before.double().unflatten(-1, (-1, 2)).contiguous()
        cos, sin = cos_sin_CR[positions_T].double().chunk(2, dim=-1)
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin).unsqueeze(1)
        close(result, torch.cat((turned.real, turned.imag), dim=-1), dtype)
    assert torch.equal(moved_q[..., :5].cpu(), q_THD[..., :5])  # what lies beside is untouched
    assert torch.equal(moved_k[..., :9].cpu(), k_TGZ[..., :9])
