"""Which ranks connect their memory. What they then carry is tested between GPUs (contracts)."""

import logging
from typing import Any

import pytest
import torch

from plugins.comm import symm_mem


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two ranks of this host, and what they say of themselves, in the order of asking."""
    said: dict[str, Any] = {"asked": [], "others": [True, True]}

    def all_can(this_rank: bool, group: object, device: torch.device) -> bool:
        said["asked"].append(this_rank)
        return this_rank and said["others"][len(said["asked"]) - 1]

    monkeypatch.setattr(symm_mem, "_all_can", all_can)
    monkeypatch.setattr(symm_mem, "_reaches_all", lambda device, size: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symm_mem.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(symm_mem, "_exchange_buffers", lambda group, size, device: "memory")
    return said


def connect() -> object:
    group: Any = object()
    return symm_mem._connect(group)


def test_ranks_that_all_can_are_connected(ranks: dict[str, Any]) -> None:
    assert connect() == "memory"
    assert ranks["asked"] == [True, True]


def test_one_out_of_reach_leaves_all_to_nccl(
    ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symm_mem, "_reaches_all", lambda device, size: False)
    assert connect() is None
    assert ranks["asked"] == [False]


def test_a_refusal_of_the_system_is_told_and_agreed_on(
    ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(group: object, size: int, device: torch.device) -> object:
        raise RuntimeError("pidfd_getfd: not permitted\nand more")

    monkeypatch.setattr(symm_mem, "_exchange_buffers", refuse)
    with caplog.at_level(logging.WARNING):
        assert connect() is None
    assert ranks["asked"] == [True, False]
    assert "pidfd_getfd: not permitted (comm=nccl does without)" in caplog.text


def test_a_peer_that_was_refused_counts_for_all(ranks: dict[str, Any]) -> None:
    ranks["others"] = [True, False]
    assert connect() is None
    assert ranks["asked"] == [True, True]
