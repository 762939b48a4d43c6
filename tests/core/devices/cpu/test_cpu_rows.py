"""How many rows a packed linear layer multiplies, and that the extra ones are not seen."""

import pytest
import torch

from core.devices.cpu.cpu_linear import padded_rows
from core.devices.cpu.cpu_ops import CpuOps


def test_few_shapes_and_little_waste() -> None:
    padded = [padded_rows(rows) for rows in range(1, 8193)]
    assert len(set(padded)) < 70
    for rows, multiplied in enumerate(padded, start=1):
        assert rows <= multiplied <= max(2 * rows, 16)
        assert rows <= 128 or multiplied <= rows * 1.125 + 1
    assert padded_rows(0) == 0


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 33, 130])
def test_result_has_the_rows_that_were_given(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight_OI = torch.randn(24, 40, generator=generator).bfloat16()
    x_TI = torch.randn(rows, 40, generator=generator).bfloat16()
    result_TO = CpuOps().linear(weight_OI, None)(x_TI)
    assert result_TO.shape == (rows, 24)
    expected_TO = x_TI.double() @ weight_OI.double().T
    torch.testing.assert_close(result_TO.double(), expected_TO, rtol=1e-2, atol=2e-2)
