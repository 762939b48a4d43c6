"""Kernels for linear layers of few rows, against float64, whatever their tiles.

In Triton's interpreter where there is no GPU. Shape legend: see
core.devices.cuda.linear.triton_skinny.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices.cuda.linear.triton_linear import (
    linear,
    measured,
    prepare,
    usual_matrix,
    usual_vector,
)
from core.gpu_tools import tuning
from tests.contracts import plain_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES: list[dict[str, Any]] = [
    {"path": "vector", "ROWS": 1, "BLOCK_O": 2, "BLOCK_I": 64, "num_warps": 1},
    {"path": "vector", "ROWS": 4, "BLOCK_O": 8, "BLOCK_I": 256, "num_warps": 4},
    {"path": "matrix", "BLOCK_T": 16, "BLOCK_O": 16, "BLOCK_I": 64, "SPLIT": 1, "PREFETCH_I": 64},
    {"path": "matrix", "BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 16, "SPLIT": 3, "PREFETCH_I": 1024},
    {"path": "matrix", "BLOCK_T": 32, "BLOCK_O": 16, "BLOCK_I": 32, "SPLIT": 2, "PREFETCH_I": 0},
]
WIDES: list[dict[str, Any]] = [
    {"BLOCK_T": 16, "BLOCK_O": 16, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_T": 64, "BLOCK_O": 32, "BLOCK_I": 64, "num_warps": 4, "num_stages": 3},
]
each_tile = pytest.mark.parametrize(
    "tile", TILES, ids=lambda tile: "-".join(map(str, tile.values()))
)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    out = plain_ops.linear(x, weight, bias)
    return plain_ops.silu_and_mul(out) if gated else out


@pytest.mark.pairwise
@each_tile
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "biased"),
    [
        (2, 7, torch.float16, False),
        (34, 136, torch.bfloat16, True),
        (64, 64, torch.bfloat16, False),
    ],
    ids=str,
)
def test_agrees_with_float64(
    tile: dict[str, Any], gated: bool, outputs: int, inputs: int, dtype: torch.dtype, biased: bool
) -> None:
    most = tile.get("ROWS", 40)
    tile = {"max_rows": most, "num_warps": 4, "num_stages": 3, **tile}
    weight = normal(1, outputs, inputs, dtype=dtype)
    bias = normal(2, outputs, dtype=dtype) if biased else None
    kernel = prepare(
        weight.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        gated=gated,
        dtype=torch.float32,
        tile=tile,
    )
    for rows in (row for row in (1, 3, 40) if row <= most):
        wide_TX = normal(3, rows, inputs + 5, dtype=dtype)  # rows lie apart, at odd places
        right = expected(wide_TX[:, 5:], weight, bias, gated)
        x = wide_TX.to(DEVICE)[:, 5:]
        result = kernel(x)
        assert result.dtype == torch.float32
        assert ((result.cpu().double() - right).norm() / right.norm()).item() <= 1e-5
        assert torch.equal(kernel(x), result)  # whoever adds the parts of a sum


@pytest.mark.pairwise
@pytest.mark.parametrize("tile", WIDES, ids=lambda tile: "-".join(map(str, tile.values())))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "biased"),
    [
        (16, 8, torch.float16, False),
        (48, 136, torch.bfloat16, True),
        (64, 64, torch.bfloat16, False),
    ],
    ids=str,
)
def test_wide_tiles_agree_with_float64(
    tile: dict[str, Any], gated: bool, outputs: int, inputs: int, dtype: torch.dtype, biased: bool
) -> None:
    weight = normal(1, outputs, inputs, dtype=dtype)
    bias = normal(2, outputs, dtype=dtype) if biased else None
    kernel = prepare(
        weight.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        gated=gated,
        dtype=torch.float32,
        tile={"path": "wide", "max_rows": 300, **tile},
    )
    for rows in (0, 1, 40, 150):
        for apart, first in ((inputs, 0), (inputs + 5, 5)):  # as TMA reads them, and not
            x_TX = normal(3, rows, apart, dtype=dtype)
            right = expected(x_TX[:, first:], weight, bias, gated)
            x = x_TX.to(DEVICE)[:, first:]
            result = kernel(x)
            assert result.dtype == torch.float32
            assert result.shape == right.shape
            if rows:
                assert ((result.cpu().double() - right).norm() / right.norm()).item() <= 1e-5
                assert torch.equal(kernel(x), result)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Gluon kernels run in no interpreter")
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(128, 64), (264, 192), (512, 4096), (768, 2048)], ids=str
)
def test_gluon_agrees_with_float64(outputs: int, inputs: int) -> None:
    weight = normal(1, 2 * outputs, inputs, dtype=torch.bfloat16)
    tile = {"path": "gluon", "max_rows": 8192}
    kernel = prepare(weight.to(DEVICE), None, gated=True, dtype=None, tile=tile)
    for rows in (0, 1, 127, 300, 4096):
        for apart, first in ((inputs, 0), (inputs + 5, 5)):  # as the copy engine reads, and not
            x_TX = normal(3, rows, apart, dtype=torch.bfloat16) * inputs**-0.5
            right = expected(x_TX[:, first:], weight, None, True)
            result = kernel(x_TX.to(DEVICE)[:, first:])
            assert result.shape == right.shape
            if rows:
                assert ((result.cpu().double() - right).norm() / right.norm()).item() <= 1e-2
                assert torch.equal(kernel(x_TX.to(DEVICE)[:, first:]), result)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 14336), (1280, 8192), (2048, 768), (28672, 4096)], ids=str
)
def test_chosen_kernels_agree_with_float64(gated: bool, shape: tuple[int, int]) -> None:
    weight = normal(1, *shape, dtype=torch.bfloat16).to(DEVICE)
    bias = normal(2, shape[0], dtype=torch.bfloat16).to(DEVICE)
    kernel = linear(
        "gated_linear" if gated else "linear",
        weight,
        bias,
        lambda x: expected(x, weight, bias, gated).to(x.dtype),
        gated=gated,
    )
    for rows in (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 64, 65, 100, 256, 257, 513, 1024, 1025):
        x = normal(rows, rows, shape[1], dtype=torch.bfloat16).to(DEVICE)
        result, right = kernel(x), expected(x, weight, bias, gated)
        assert result.shape == right.shape
        assert result.dtype == x.dtype
        if rows:
            assert ((result.double() - right).norm() / right.norm()).item() <= 6e-3
            assert torch.equal(kernel(x), result)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_replays_in_a_graph(rows: int) -> None:
    weights = [normal(seed, 512, 512, dtype=torch.bfloat16).to(DEVICE) for seed in range(6)]
    kernels = [linear("linear", weight / 20, None, _never) for weight in weights]
    x = normal(9, rows, 512, dtype=torch.bfloat16).to(DEVICE)

    def chain(x: Tensor) -> Tensor:
        for kernel in kernels:
            x = kernel(x)
        return x

    if measured("linear_bf16", DEVICE, 512, 512)[-1]["max_rows"] < rows:
        pytest.skip("the vendor's")
    eager = chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(x)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, eager)


def _never(x: Tensor) -> Tensor:
    raise AssertionError("not for so few rows")


def _recorder(calls: list[int]) -> Callable[[Tensor], Tensor]:
    def vendor(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return x.new_empty((x.shape[0], 32))

    return vendor


def test_leaves_what_it_cannot_read_in_wide_steps_to_the_vendor() -> None:
    calls: list[int] = []
    for weight in (
        torch.ones(32, 64),  # float32
        torch.ones(32, 65, dtype=torch.bfloat16),  # rows not of 16 bytes
        torch.ones(64, 32, dtype=torch.bfloat16).t(),  # transposed
    ):
        kernel = linear("linear", weight.to(DEVICE), None, _recorder(calls))
        kernel(torch.ones(1, weight.shape[1], dtype=weight.dtype, device=DEVICE))
    assert calls == [1, 1, 1]


def test_leaves_no_rows_and_many_rows_to_the_vendor() -> None:
    calls: list[int] = []
    weight = torch.ones(32, 64, dtype=torch.bfloat16, device=DEVICE)
    kernel = linear("linear", weight, None, _recorder(calls))
    for rows in (0, 1, 300, 257):
        kernel(torch.ones(rows, 64, dtype=weight.dtype, device=DEVICE))
    assert calls == [0, 300, 257]


def test_tables_may_speak_of_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the rows that are looked up one by one, the first that suffices; then the vendor."""
    tile = {"BLOCK_T": 64, "BLOCK_O": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 3}
    rows = [
        {"max_rows": 8, "path": "vendor"},
        {"max_rows": 20, "path": "wide", **tile},
        {"max_rows": 30, "path": "vendor"},
        {"max_rows": 40, "path": "wide", **tile},
    ]
    monkeypatch.setattr("core.devices.cuda.linear.triton_linear.MOST_ROWS", 10)
    monkeypatch.setattr(
        "core.devices.cuda.linear.triton_linear.measured", lambda *shape: tuple(rows)
    )
    calls: list[int] = []
    weight = normal(1, 32, 64, dtype=torch.bfloat16).to(DEVICE)
    kernel = linear("linear", weight, None, _recorder(calls))
    for num_rows in (8, 9, 15, 25, 35, 41):
        x = normal(2, num_rows, 64, dtype=torch.bfloat16).to(DEVICE)
        out = kernel(x)
        if num_rows not in calls:
            right = F.linear(x.double(), weight.double())
            assert float((out.double() - right).norm() / right.norm()) <= 1e-2
    assert calls == [8, 25, 41]


def test_usual_tiles_hold_for_any_shape() -> None:
    for size_O, size_I in ((8, 8), (256, 128), (5120, 2048), (128256, 16384), (2304, 53248)):
        vector, matrix = usual_vector(size_O, size_I), usual_matrix(size_O, size_I)
        assert vector["BLOCK_O"] * vector["BLOCK_I"] <= 16384  # registers
        assert vector["max_rows"] < matrix["max_rows"]


@pytest.mark.parametrize(
    "operation", ["linear_bf16", "gated_linear_bf16", "logits_bf16", "gate_bf16"]
)
def test_tables_name_what_kernels_take(operation: str) -> None:
    rows = tuning.rows_of(operation, "H100")
    assert rows
    for row in rows:
        if row["path"] == "vector":
            assert row["ROWS"] == row["max_rows"]
        elif row["path"] == "matrix":
            assert row["BLOCK_T"] >= min(16, row["max_rows"])
            assert row["BLOCK_I"] * row["SPLIT"] <= row["inputs"]
        elif row["path"] == "wide":
            assert row["BLOCK_T"] >= 64
            assert row["outputs"] * 2 % 16 == row["inputs"] * 2 % 16 == 0
        elif row["path"] == "gluon":
            assert operation == "gated_linear_bf16"
            assert row["outputs"] % 16 == row["inputs"] % 64 == 0
        else:
            assert row["path"] == "vendor"
        if row["path"] not in ("vendor", "gluon") and operation == "gated_linear_bf16":
            assert row["BLOCK_O"] % 2 == 0
