"""How large the KV pool becomes: on a GPU of which everything else is known, and on a CPU."""

from typing import Any

import psutil
import pytest
import torch

from core.engine.build.memory import (
    CPU_POOL_BYTES,
    GIB,
    MARGIN_BYTES,
    HeldMemory,
    page_bytes,
    plan_pool,
)
from core.errors import ResourceError
from core.interfaces.model import KVShape
from core.settings.config import EngineConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KV = KVShape(num_layers=32, num_kv_heads=8, head_dim=128, scale=1.0)
PAGE_SIZE = 16
TOTAL = 80 * GIB
HELD = HeldMemory(weights=15 * GIB, state=GIB // 4, activations=3 * GIB, graphs=GIB)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of a device of 80 GiB."""
    free = [TOTAL - 19 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], TOTAL))
    return free


def engine_config(**fields: Any) -> EngineConfig:
    return EngineConfig(page_size=PAGE_SIZE, **fields)


def pool_bytes(
    config: EngineConfig,
    held: HeldMemory = HELD,
    device: torch.device = CUDA,
    max_model_len: int = 1 << 20,
) -> int:
    size = plan_pool(
        config,
        KV,
        dtype=torch.bfloat16,
        device=device,
        max_model_len=max_model_len,
        local_ranks=1,
        held=held,
    )
    assert size.page_bytes == page_bytes(config, KV, torch.bfloat16) == 131072 * PAGE_SIZE
    return size.total_bytes


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fraction", [0.4, 0.85, 0.95])
def test_all_that_is_held_is_the_fraction_of_the_device(fraction: float) -> None:
    config = engine_config(mem_fraction=fraction)
    together = pool_bytes(config) + HELD.total + MARGIN_BYTES
    assert 0 <= fraction * TOTAL - together < 131072 * PAGE_SIZE


def test_a_part_that_others_hold_is_not_taken(gpu: list[int]) -> None:
    gpu[0] = 10 * GIB
    assert pool_bytes(engine_config()) <= 10 * GIB - HELD.graphs - MARGIN_BYTES // 2


@pytest.mark.usefixtures("gpu")
def test_no_more_than_the_requests_can_use() -> None:
    config = engine_config(max_running_requests=2)
    assert pool_bytes(config, max_model_len=100) == (2 * 7 + 1) * 131072 * PAGE_SIZE


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_is_told_by_its_shares() -> None:
    with pytest.raises(ResourceError) as caught:
        pool_bytes(engine_config(mem_fraction=0.2))
    for part in (
        "engine.mem_fraction=0.2 of the 80.00 GiB of cuda:0",
        "weights 15.00",
        "slots and buffers 0.25",
        "activations of the largest step 3.00",
        "CUDA graphs 1.00",
        "margin 1.00 GiB",
        "raise engine.mem_fraction, lower engine.max_prefill_tokens",
    ):
        assert part in str(caught.value), part


@pytest.mark.usefixtures("gpu")
def test_a_pool_that_was_asked_for_fits_or_is_refused_with_the_most() -> None:
    most = pool_bytes(engine_config()) // 131072 - PAGE_SIZE
    assert pool_bytes(engine_config(kv_cache_tokens=most)) > 0
    with pytest.raises(ResourceError, match=f"lower engine.kv_cache_tokens to at most {most}"):
        pool_bytes(engine_config(kv_cache_tokens=most + PAGE_SIZE))


def test_a_cpu_gives_a_fraction_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 2 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    found = pool_bytes(engine_config(mem_fraction=0.5), HeldMemory(), CPU)
    assert 0 <= GIB - found < 131072 * PAGE_SIZE
    assert 0 <= GIB - pool_bytes(engine_config(), HeldMemory(), CPU) < 131072 * PAGE_SIZE, "half"
    Memory.available = 100 * GIB
    assert 0 <= CPU_POOL_BYTES - pool_bytes(engine_config(), HeldMemory(), CPU) < 131072 * PAGE_SIZE
