"""Which ranks connect their memory. What they then carry is tested between GPUs (contracts)."""

import logging
from typing import Any

import pytest
import torch

from core.gpu_tools import peer_memory


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two ranks of this host, and what they say of themselves, in the order of asking."""
    said: dict[str, Any] = {"asked": [], "others": [True, True]}

    def all_can(this_rank: bool, group: object, device: torch.device) -> bool:
        said["asked"].append(this_rank)
        return this_rank and said["others"][len(said["asked"]) - 1]

    monkeypatch.setattr(peer_memory, "_all_can", all_can)
    monkeypatch.setattr(peer_memory, "_reaches_all", lambda device, size: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(peer_memory.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer_memory, "_exchange_buffers", lambda *_: "memory")
    return said


def connect() -> object:
    group: Any = object()
    return peer_memory.connect(group, 1, 1, key="comm=symm_mem", instead="NCCL is used")


def test_ranks_that_all_can_are_connected(ranks: dict[str, Any]) -> None:
    assert connect() == "memory"
    assert ranks["asked"] == [True, True]


def test_one_out_of_reach_leaves_all_unconnected(
    ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_memory, "_reaches_all", lambda device, size: False)
    assert connect() is None
    assert ranks["asked"] == [False]


def test_a_refusal_of_the_system_is_told_and_agreed_on(
    ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> object:
        raise RuntimeError("pidfd_getfd: not permitted\nand more")

    monkeypatch.setattr(peer_memory, "_exchange_buffers", refuse)
    with caplog.at_level(logging.WARNING):
        assert connect() is None
    assert ranks["asked"] == [True, False]
    assert "comm=symm_mem: pidfd_getfd: not permitted; NCCL is used" in caplog.text


def test_a_peer_that_was_refused_counts_for_all(ranks: dict[str, Any]) -> None:
    ranks["others"] = [True, False]
    assert connect() is None
    assert ranks["asked"] == [True, True]


def test_ranks_share_a_gpu_only_where_torch_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = torch.device("cuda", 0)
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    assert not peer_memory._reaches_all(device, 2)
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert peer_memory._reaches_all(device, 2)
    assert not peer_memory._reaches_all(device, 9)
