"""Sizes of `deep_ep`'s buffers, for tests/support/fake_deep_ep.py."""

from dataclasses import dataclass

NVL_PEERS = 8


@dataclass
class Config:
    """Sizes of normal mode's chunks; hints as csrc/config.hpp computes them."""

    num_sms: int
    num_max_nvl_chunked_send_tokens: int
    num_max_nvl_chunked_recv_tokens: int
    num_max_rdma_chunked_send_tokens: int
    num_max_rdma_chunked_recv_tokens: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        nvl_ranks, rdma_ranks = min(num_ranks, NVL_PEERS), max(num_ranks // NVL_PEERS, 1)
        slots = self.num_sms // 2 * nvl_ranks
        row = hidden_bytes + 8 + 128 * (8 + 4 + 4)
        return slots * ((2 * rdma_ranks + 3) * 4 + self.num_max_nvl_chunked_recv_tokens * row)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= NVL_PEERS:
            return 0
        slots = self.num_sms // 2 * (num_ranks // NVL_PEERS) * 2
        row = hidden_bytes + 8 + 128 * (8 + 4 + 4) + 16
        return slots * (72 + self.num_max_rdma_chunked_recv_tokens * row) + 2**20
