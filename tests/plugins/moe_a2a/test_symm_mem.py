"""symm_mem: where parts of a buffer lie, and who is refused. What it carries is in the contract
(tests/contracts/test_a2a_symm_mem.py)."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from core.devices.select import select_row_ops
from core.errors import ConfigError
from core.interfaces.comm import SoloCommunicator
from core.interfaces.moe_a2a import A2ASpec
from plugins.moe_a2a import symm_mem
from plugins.moe_a2a._gathered import GatherDispatcher
from plugins.moe_a2a._options import SymmMemOptions
from plugins.moe_a2a._peer_layout import layout_of, rows_within
from tests.support.hopper import run_for_hopper


@dataclass(frozen=True)
class Place:
    """Rank 0 of some ranks."""

    size: int
    rank: int = 0
    capturable: bool = False


def spec(ranks: int = 8, **changes: Any) -> A2ASpec:
    """DeepSeek-V3's rows."""
    plain = A2ASpec(
        comm=SoloCommunicator() if ranks == 1 else Place(ranks),  # type: ignore[arg-type]
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        ops=select_row_ops(torch.device("cpu")),
        max_rows=4096,
        phase="decode",
        fp8=True,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("fp8", [False, True])
def test_parts_follow_one_another_and_hold_what_they_must(fp8: bool) -> None:
    found = layout_of(spec(), 100, 64, fp8=fp8)
    places = 8 * 100
    needed = {
        "spans": 4 * 2 * 8,
        "rows": places * 7168 * (1 if fp8 else 2),
        "scales": places * 56 * 4 if fp8 else 0,
        "ids": places * 8 * 8,
        "weights": places * 8 * 4,
        "sums": places * 7168 * 2,
    }
    ends = [*(getattr(found, name) for name in needed), found.num_bytes]
    assert found.spans >= 8 * 64 * 4, "flags lie before"
    for (first, last), num_bytes in zip(pairwise(ends), needed.values(), strict=True):
        assert num_bytes <= last - first < num_bytes + 128
        assert first % 128 == 0


@pytest.mark.parametrize("mib", [1, 7, 256, 100_000])
def test_a_buffer_holds_as_many_rows_as_fit(mib: int) -> None:
    most = rows_within(spec(), mib * 2**20, 64, fp8=True)
    assert layout_of(spec(), most, 64, fp8=True).num_bytes <= mib * 2**20
    if most < 4096:
        assert layout_of(spec(), most + 1, 64, fp8=True).num_bytes > mib * 2**20
    else:
        assert mib == 100_000


def test_a_buffer_that_holds_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe_a2a.decode.options.buffer_mib=1 holds no row"):
        symm_mem.layout_within(SymmMemOptions(buffer_mib=1), spec(hidden_size=2**17))


def test_one_rank_needs_no_peers() -> None:
    assert isinstance(symm_mem.create(SymmMemOptions(), spec(1)), GatherDispatcher)


def test_cpus_and_communicators_without_a_group_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe_a2a.decode=symm_mem needs a CUDA device"):
        symm_mem.create(SymmMemOptions(), spec())
    with pytest.raises(ConfigError, match=r"the communicator of comm.ep has none"):
        symm_mem.create(SymmMemOptions(), spec(device=torch.device("cuda"), hidden_size=1))


COMPILED = """
from dataclasses import replace
from core.gpu_tools.compile_ahead import rehearsal
from core.gpu_tools.peer_memory import PeerMemory
from plugins.moe_a2a.symm_mem import SymmMemDispatcher, layout_of
from tests.plugins.moe_a2a.test_symm_mem import Place, spec

count = 0
with rehearsal(CPU, lambda done, total: None, 4):
    for ranks, changes, fp8 in (
        (2, {"hidden_size": 2048, "num_experts": 128}, False),
        (8, {}, True),
        (4, {"hidden_size": 200, "top_k": 6, "dtype": torch.float32}, False),
    ):
        one = replace(spec(ranks, **changes), comm=Place(ranks, ranks - 1))
        layout = layout_of(one, 4, 64, fp8=fp8)
        own = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        epochs = torch.zeros(64, dtype=torch.int32)
        addresses = torch.full((ranks,), own.data_ptr())
        memory = PeerMemory(ranks - 1, ranks, own, addresses, epochs)
        made = SymmMemDispatcher(one, layout, memory, Place(ranks))
        for counts in ([1] * ranks, [3, *[4] * (ranks - 1)]):
            rows = counts[-1]
            x_TE = torch.zeros(rows, one.hidden_size, dtype=one.dtype)
            ids = torch.zeros(rows, one.top_k, dtype=torch.int64)
            dispatched = made.dispatch(x_TE, ids, ids.float(), counts)
            output = torch.zeros(sum(counts), one.hidden_size, dtype=one.dtype)
            assert made.combine(output, dispatched).shape == x_TE.shape
            count += 1
print("compiled", count)
"""  # fmt: skip


def test_its_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    assert run_for_hopper(COMPILED, tmp_path) == "compiled 6\n"
