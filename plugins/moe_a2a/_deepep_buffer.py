"""DeepEP's communication buffer: one for both phases, made once, cleaned between its two modes.

Knows the package's `Buffer` (V1 of DeepEP, kept as the legacy buffer of V2), not what is sent.
"""

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from core.errors import ConfigError
from core.interfaces.comm import Communicator

_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one phase needs of the buffer."""

    num_sms: int
    nvl_bytes: int = 0
    rdma_bytes: int = 0
    queue_pairs: int = 0  # RDMA connections of each pair of ranks
    low_latency_rows: int = 0  # 0: normal mode


class SharedBuffer:
    """The buffer of the ranks of one communicator.

    It is made when both phases have said what they need, or at the first use: the ranks meet
    then, so all of them get there in the same order. It is never destroyed, because that waits
    for every rank, and one may be dead; the process's end frees it.
    """

    def __init__(self, library: ModuleType, comm: Communicator, key: str) -> None:
        """Raises ConfigError where the communicator has no group that DeepEP could connect."""
        self._group = getattr(comm, "group", None)
        if self._group is None:
            raise ConfigError(
                f"{key}=deepep connects the ranks of a torch.distributed group by itself, but the "
                "communicator of comm.ep has none; set comm.ep=nccl"
            )
        self._library = library
        self._demands: dict[str, Demand] = {}
        self._buffer: Any = None
        self._normal_ran = False

    def need(self, phase: str, demand: Demand) -> None:
        """Say what a phase needs, before anything is sent."""
        assert self._buffer is None, "the buffer is made already"
        assert phase not in self._demands, f"two dispatchers of the phase {phase}"
        self._demands[phase] = demand
        if set(self._demands) == set(_PHASES):
            self._make()

    def normal(self) -> Any:
        """The buffer, for calls of normal mode."""
        self._normal_ran = True
        return self._made()

    def low_latency(self, rows: int, hidden_size: int, num_experts: int) -> Any:
        """The buffer, for calls of low-latency mode, which needs zeros that normal mode left dirty.
        All ranks change modes together, so all clean together."""
        buffer = self._made()
        if self._normal_ran:
            buffer.clean_low_latency_buffer(rows, hidden_size, num_experts)
            self._normal_ran = False
        return buffer

    def _made(self) -> Any:
        if self._buffer is None:
            self._make()
        return self._buffer

    def _make(self) -> None:
        demands = self._demands.values()
        rows = max(demand.low_latency_rows for demand in demands)
        if rows:
            # Queues must hold all messages in flight: each row, and a count, of two operations.
            depth = max(1024, 1 << (2 * (rows + 1) - 1).bit_length())
            os.environ.setdefault("NVSHMEM_QP_DEPTH", str(depth))
        self._library.Buffer.set_num_sms(max(demand.num_sms for demand in demands))
        self._buffer = self._library.Buffer(
            self._group,
            num_nvl_bytes=max(demand.nvl_bytes for demand in demands),
            num_rdma_bytes=max(demand.rdma_bytes for demand in demands),
            low_latency_mode=rows > 0,
            num_qps_per_rank=max(demand.queue_pairs for demand in demands),
            explicitly_destroy=True,
        )


# Dispatchers of two phases are built apart from each other and know only their communicator.
_shared: WeakKeyDictionary[Communicator, SharedBuffer] = WeakKeyDictionary()


def shared_buffer(library: ModuleType, comm: Communicator, key: str) -> SharedBuffer:
    """The buffer that the dispatchers of a communicator share. Raises ConfigError."""
    if comm not in _shared:
        _shared[comm] = SharedBuffer(library, comm, key)
    return _shared[comm]
