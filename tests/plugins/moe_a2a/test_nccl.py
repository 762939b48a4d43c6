"""When nccl knows its sizes before a step, and what that costs."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.a2a_bytes import measure
from core.devices.select import select_row_ops
from core.errors import ConfigError
from core.interfaces.moe_a2a import A2ASpec
from plugins.moe_a2a import nccl
from plugins.moe_a2a._fixed import bytes_ratio
from plugins.moe_a2a._options import NcclOptions


@dataclass(frozen=True)
class Place:
    size: int
    rank: int = 0
    capturable: bool = True


def spec(ranks: int, phase: str, device: str = "cuda") -> A2ASpec:
    comm: Any = Place(ranks)
    return A2ASpec(
        comm=comm,
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        dtype=torch.bfloat16,
        device=torch.device(device),
        ops=select_row_ops(torch.device(device)),
        max_rows=64,
        phase=phase,
    )


@pytest.mark.parametrize(
    ("ranks", "phase", "device", "fixed"),
    [
        (2, "decode", "cuda", True),
        (64, "decode", "cuda", True),
        (8, "prefill", "cuda", True),
        (16, "prefill", "cuda", False),  # 2.5 times the bytes
        (2, "decode", "cpu", False),  # nothing is recorded there
    ],
)
def test_auto_decides_by_phase_and_bytes(ranks: int, phase: str, device: str, fixed: bool) -> None:
    assert nccl.sizes_are_fixed(NcclOptions(), spec(ranks, phase, device)) == fixed


def test_a_choice_is_kept() -> None:
    assert nccl.sizes_are_fixed(NcclOptions(exchange="fixed"), spec(64, "prefill"))
    assert not nccl.sizes_are_fixed(NcclOptions(exchange="counted"), spec(2, "decode"))
    with pytest.raises(ConfigError, match=r"moe_a2a.<phase>.options.exchange='often'.*counted"):
        NcclOptions(exchange="often")


def test_steps_of_fixed_sizes_may_be_recorded() -> None:
    made = nccl.create(NcclOptions(exchange="fixed"), spec(2, "decode", "cpu"))
    assert made.capturable
    assert not nccl.create(NcclOptions(), spec(2, "decode", "cpu")).capturable


def test_the_ratio_of_bytes_is_what_travels() -> None:
    """Of rows, whose experts are drawn at random; the benchmark's routing prefers few groups."""
    assert bytes_ratio(2, 8) < 1.01
    assert 1.5 < bytes_ratio(8, 8) < 1.55
    result = measure(4, 16, fp8=True)
    assert bytes_ratio(4, 8) <= result["fixed_ratio"] < 1.5
