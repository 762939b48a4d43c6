"""What the all-to-alls move between ranks, in bytes and in collectives."""

import pytest

from benchmarks.a2a_bytes import CountingCommunicator, measure, moved
from plugins.moe_a2a._options import NcclOptions
from plugins.moe_a2a.nccl import NcclDispatcher


@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_nccl_moves_hardly_more_than_it_must(fp8: bool) -> None:
    result = measure(4, 8, fp8=fp8)
    assert 1.0 <= result["ratio"] < 1.01
    assert result["least"] < 0.5 * result["once_per_expert"], "a row goes once to a rank"


def test_nccl_takes_three_collectives_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, rows and sums: each more costs a round trip in every layer."""
    calls = []
    count = CountingCommunicator._count

    def note(self: CountingCommunicator, num_bytes: float) -> None:
        calls.append(self.rank)
        count(self, num_bytes)

    monkeypatch.setattr(CountingCommunicator, "_count", note)
    moved(lambda spec: NcclDispatcher(NcclOptions(), spec), 2, 4, fp8=False)
    assert sorted(calls) == [0, 0, 0, 1, 1, 1]
