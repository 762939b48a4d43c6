"""A stand-in for the package `deep_ep` (V1 buffer) that carries rows over a communicator.

Its public signatures are those of the real package (tests/support/deep_ep_signatures.json), and it
is as strict: dtypes, shapes, buffer sizes, cleaning between modes, results that are garbage until
the receive hook ran, and low-latency results that the second next call overwrites. Rows arrive in
an arbitrary order within an expert, as they do over RDMA. Knows nothing of the plugin that uses it.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from plugins.comm.gloo import GlooCommunicator
from tests.support.fake_deep_ep_config import NVL_PEERS, Config

LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
MAX_TOP_K = 11
FINISHED_SUM_TAG = 1024
FP8 = torch.float8_e4m3fn


class FakeGroup:
    """What the fake takes for a ProcessGroup: ranks in threads."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def rank(self) -> int:
        return self.comm.rank

    def size(self) -> int:
        return self.comm.size


class EventOverlap:
    """An event that has happened."""

    def __init__(
        self, event: object | None = None, extra_tensors: tuple[Tensor] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """See the package's own docstrings; `made` lists the buffers made, for tests."""

    num_sms: int = 20
    made: list["Buffer"] = []  # noqa: RUF012  # of the test that installed the fake

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self._comm = group.comm if isinstance(group, FakeGroup) else GlooCommunicator(group)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.num_qps_per_rank = num_qps_per_rank
        self.explicitly_destroy = explicitly_destroy
        self.cleaned = 0
        self._dirty = False
        self._made_results: list[list[Tensor]] = []
        self._generator = torch.Generator().manual_seed(self.rank)
        type(self).made.append(self)
        # The real one exchanges handles here, so every rank has to come.
        sizes = torch.tensor([[num_nvl_bytes, num_rdma_bytes, int(low_latency_mode)]])
        assert len(self._comm.all_gather(sizes, 0).unique(dim=0)) == 1, "ranks made other buffers"

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        message = 16 + 2 * hidden
        combined = num_experts * num_max_dispatch_tokens_per_rank * (hidden // 128 * 4 + 2 * hidden)
        arrived = max(combined, num_experts * num_max_dispatch_tokens_per_rank * message)
        return (2 * combined + 2 * arrived + 16 * num_experts + 128) // 128 * 128

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), "Unsupported number of ranks"
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), "Unsupported number of ranks"
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    # Normal mode.

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        _check(topk_idx, 2, torch.int64)
        assert num_experts % self.group_size == 0
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        num_local = num_experts // self.group_size
        goes = torch.zeros(len(topk_idx), self.group_size + 1, dtype=torch.bool)
        goes.scatter_(
            1, topk_idx.div(num_local, rounding_mode="floor") % (self.group_size + 1), True
        )
        goes = goes[:, : self.group_size].contiguous()
        per_rank = goes.sum(0).int()
        if self.group_size <= NVL_PEERS:
            return per_rank, None, per_expert, goes, EventOverlap()
        per_node = goes.unflatten(1, (-1, NVL_PEERS)).any(2).sum(0).int()
        return per_rank, per_node, per_expert, goes, EventOverlap()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int], tuple, EventOverlap]:
        assert handle is None, "the fake knows no cached layouts"
        assert num_worst_tokens == 0, "the fake counts"
        x, scales = x if isinstance(x, tuple) else (x, None)
        _check(x, 2, torch.bfloat16 if scales is None else FP8)
        self._check_normal(x.shape[1])
        assert topk_idx is not None
        assert topk_weights is not None
        _check(topk_idx, 2, torch.int64)
        _check(topk_weights, 2, torch.float32)
        assert topk_idx.shape == topk_weights.shape
        assert len(topk_idx) == len(x)
        num_experts = len(num_tokens_per_expert)
        layout = self.get_dispatch_layout(topk_idx, num_experts)
        given = (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert)
        for mine, theirs in zip((*layout[:3], layout[3]), (*given, is_token_in_rank), strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), "another layout"
        self._dirty = True
        order = is_token_in_rank.T.nonzero()[:, 1]
        sent = num_tokens_per_rank.tolist()
        received = self._counts(sent)
        came = self._comm.all_to_all(x[order], sent, received)
        idx = self._comm.all_to_all(topk_idx[order], sent, received)
        weights = self._comm.all_to_all(topk_weights[order], sent, received)
        num_local = num_experts // self.group_size
        local = idx - self.rank * num_local
        here = (local >= 0) & (local < num_local)
        local = torch.where(here, local, -1)
        per_expert = torch.bincount(local[here], minlength=num_local)
        aligned = (-(-per_expert // expert_alignment) * expert_alignment).tolist()
        handle = ("normal", order, sent, received, len(x))
        if scales is None:
            result: Any = came
        else:
            _check(scales, 2, torch.float32)
            assert scales.shape == (len(x), x.shape[1] // 128)
            result = (came, self._comm.all_to_all(scales[order], sent, received))
        return result, local, weights.masked_fill(~here, 0.0), aligned, handle, EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        _check(x, 2, torch.bfloat16)
        self._check_normal(x.shape[1])
        mode, order, sent, received, num_tokens = handle
        assert mode == "normal"
        assert len(x) == sum(received)
        self._dirty = True
        returned = self._comm.all_to_all(x, received, sent)
        total = torch.zeros(num_tokens, x.shape[1]).index_add_(0, order, returned.float())
        return total.bfloat16(), None, EventOverlap()

    # Low-latency mode.

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        self._check_low_latency(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._comm.all_reduce(torch.zeros(1))  # a barrier of all ranks
        self.cleaned += 1
        self._dirty = False

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple, EventOverlap, Callable[[], None]]:
        room, hidden, ranks = num_max_dispatch_tokens_per_rank, x.shape[1], self.group_size
        self._check_low_latency(room, hidden, num_experts)
        self._check_sent(x, topk_idx, room)
        assert not self._dirty, "normal mode ran: clean_low_latency_buffer first"
        assert not (async_finish and return_recv_hook)
        num_local = num_experts // ranks
        pairs = (topk_idx >= 0).nonzero()
        pairs = pairs[torch.randperm(len(pairs), generator=self._generator)]
        expert = topk_idx[pairs[:, 0], pairs[:, 1]]
        pairs, expert = pairs[expert.sort(stable=True).indices], expert.sort(stable=True).values
        sent = torch.bincount(expert // num_local, minlength=ranks).tolist()
        received = self._counts(sent)
        rows, scales = _cast(x) if use_fp8 else (x, torch.zeros(len(x), 0))
        rows = self._comm.all_to_all(rows[pairs[:, 0]], sent, received)
        scales = self._comm.all_to_all(scales[pairs[:, 0]], sent, received)
        about = torch.stack([expert % num_local, pairs[:, 0]], 1)
        about = self._comm.all_to_all(about, sent, received)

        places = room * ranks
        recv_x = torch.full((num_local, places, hidden), float("nan")).to(rows.dtype)
        # Column by column in memory, as TMA reads them.
        recv_scales = torch.full((num_local, hidden // 128, places), float("nan")).transpose(1, 2)
        recv_count = torch.full((num_local,), -1, dtype=torch.int32)
        src_info = torch.full((num_local, places), -1, dtype=torch.int32)
        layout_range = torch.zeros(num_local, ranks, dtype=torch.int64)
        from_rank = torch.repeat_interleave(torch.arange(ranks), torch.tensor(received))

        def receive() -> None:
            recv_count.zero_()
            for source in torch.randperm(ranks, generator=self._generator).tolist():
                for local in range(num_local):
                    here = ((from_rank == source) & (about[:, 0] == local)).nonzero()[:, 0]
                    begin = int(recv_count[local])
                    span = slice(begin, begin + len(here))
                    recv_x[local, span] = rows[here]
                    if use_fp8:
                        recv_scales[local, span] = scales[here]
                    src_info[local, span] = about[here, 1].int()
                    layout_range[local, source] = len(here) << 32 | begin
                    recv_count[local] += len(here)

        self._hold([recv_x, recv_scales])
        handle = (src_info, layout_range, room, hidden, num_experts)
        if not return_recv_hook:
            receive()
        came = (recv_x, recv_scales) if use_fp8 else recv_x
        return came, recv_count, handle, EventOverlap(), receive

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        src_info, layout_range, room, hidden, num_experts = handle
        self._check_low_latency(room, hidden, num_experts)
        _check(x, 3, torch.bfloat16)
        num_local, ranks = num_experts // self.group_size, self.group_size
        assert x.shape == (num_local, room * ranks, hidden)
        assert (layout_range >= 0).all(), "combined before the rows came"
        _check(topk_idx, 2, torch.int64)
        _check(topk_weights, 2, torch.float32)
        assert not self._dirty
        rows, about, counts = [], [], []
        for source in range(ranks):
            num_rows = 0
            for local in range(num_local):
                count, begin = divmod(int(layout_range[local, source]), 1 << 32)
                rows.append(x[local, begin : begin + count])
                token = src_info[local, begin : begin + count].long()
                about.append(torch.stack([token, torch.full_like(token, local)], 1))
                num_rows += count
            counts.append(num_rows)
        sent = self._counts(counts)
        returned = self._comm.all_to_all(torch.cat(rows), counts, sent).float()
        about = self._comm.all_to_all(torch.cat(about), counts, sent)
        expert = about[:, 1] + torch.repeat_interleave(
            torch.arange(ranks) * num_local, torch.tensor(sent)
        )
        matches = topk_idx[about[:, 0]] == expert[:, None]
        assert (matches.sum(1) == 1).all(), "other experts than were dispatched to"
        weights = (topk_weights[about[:, 0]] * matches).sum(1, keepdim=True)
        total = torch.zeros(len(topk_idx), hidden).index_add_(0, about[:, 0], returned * weights)
        if out is None:
            out = torch.empty(len(topk_idx), hidden, dtype=torch.bfloat16)
            self._hold([out])
        out.fill_(float("nan"))

        def receive() -> None:
            out.copy_(total)

        if not return_recv_hook:
            receive()
        return out, EventOverlap(), receive

    def _hold(self, results: list[Tensor]) -> None:
        """Only two calls' results live in the buffers."""
        self._made_results.append(results)
        if len(self._made_results) > 2:
            for old in self._made_results.pop(0):
                old.copy_(torch.full(old.shape, float("nan")))

    def _counts(self, sent: list[int]) -> list[int]:
        ones = [1] * self.group_size
        return self._comm.all_to_all(torch.tensor(sent), ones, ones).tolist()

    def _check_normal(self, hidden: int) -> None:
        ranks = self.group_size
        for config in (self.get_dispatch_config(ranks), self.get_combine_config(ranks)):
            assert self.num_nvl_bytes >= config.get_nvl_buffer_size_hint(2 * hidden, ranks)
            assert self.num_rdma_bytes >= config.get_rdma_buffer_size_hint(2 * hidden, ranks)

    def _check_low_latency(self, room: int, hidden: int, num_experts: int) -> None:
        assert self.low_latency_mode
        assert hidden in LOW_LATENCY_HIDDEN, "Unsupported hidden"
        assert num_experts % self.group_size == 0
        assert self.num_qps_per_rank >= num_experts // self.group_size
        assert room * self.group_size % 4 == 0, "TMA requires the number of tokens to be ..."
        assert room <= FINISHED_SUM_TAG
        needed = self.get_low_latency_rdma_size_hint(room, hidden, self.group_size, num_experts)
        assert needed <= self.num_rdma_bytes, "the buffer is too small"

    def _check_sent(self, x: Tensor, topk_idx: Tensor, room: int) -> None:
        _check(x, 2, torch.bfloat16)
        _check(topk_idx, 2, torch.int64)
        assert len(x) == len(topk_idx) <= room
        assert topk_idx.shape[1] <= MAX_TOP_K


def _check(x: Tensor, dim: int, dtype: torch.dtype) -> None:
    assert (x.dim(), x.dtype, x.is_contiguous()) == (dim, dtype, True), (x.shape, x.dtype)


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.float().unflatten(1, (-1, 128))
    scales = blocks.abs().amax(2).clamp(min=1e-4) / 448.0
    return (blocks / scales[..., None]).flatten(1).to(FP8), scales


def module() -> ModuleType:
    """The fake as a module, with no buffers made yet; put it into sys.modules["deep_ep"]."""
    Buffer.made = []
    Buffer.num_sms = 20
    return sys.modules[__name__]
