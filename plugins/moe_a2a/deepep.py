"""DeepEP: normal mode for prefill, low-latency mode for decode. Knows the package's documented
calls (github.com/deepseek-ai/DeepEP, `deep_ep/buffer.py`), nothing of its transports.

Shape legend: T own rows, K experts of a row, E hidden size, X physical experts, L those of this
rank, N received rows of normal mode (one for each row and rank), C places of each local expert in
low-latency mode: its rows of every rank.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, PlanError, PluginError
from core.interfaces.moe_a2a import A2ASpec, Dispatched, Dispatcher, ExpertLayout
from core.ops.block_fp8 import FP8, num_blocks
from plugins.moe_a2a._deepep_buffer import Demand, shared_buffer
from plugins.moe_a2a._deepep_limits import INSTALL, size_problems
from plugins.moe_a2a._options import LOW_LATENCY_ROWS, DeepEPOptions

_ROWS_MULTIPLE = 4  # low-latency mode's buffers hold a multiple of so many rows (TMA)


def create(options: DeepEPOptions, spec: A2ASpec) -> Dispatcher:
    """The dispatcher of a phase. Raises PluginError where the package is missing or refuses this
    machine, ConfigError (PlanError) where it can't do what the spec asks; both before any weight
    is read."""
    key = f"moe_a2a.{spec.phase}"
    if importlib.util.find_spec("deep_ep") is None:
        raise PluginError(
            f"{key}=deepep needs the package deep_ep, which is not installed; {INSTALL}, or set "
            f"{key}=nccl"
        )
    if spec.device.type != "cuda":
        raise ConfigError(
            f"{key}=deepep needs a CUDA device, but this rank computes on {spec.device}; set "
            f"engine.device=cuda, or {key}=nccl"
        )
    try:
        library = importlib.import_module("deep_ep")
    except Exception as error:  # its import checks driver, CUDA and torch, and says what is wrong
        raise PluginError(
            f"{key}=deepep: the package deep_ep can't be used here: {type(error).__name__}: "
            f"{error}\nfix that, or set {key}=nccl"
        ) from error
    return build(options, spec, library)


def build(options: DeepEPOptions, spec: A2ASpec, library: ModuleType) -> Dispatcher:
    """The dispatcher over a given `deep_ep`. Raises ConfigError."""
    key = f"moe_a2a.{spec.phase}"
    if spec.dtype != torch.bfloat16:
        raise ConfigError(
            f"{key}=deepep carries bfloat16 rows, but the model computes in "
            f"{str(spec.dtype).removeprefix('torch.')}; set model.dtype=bfloat16, or {key}=nccl"
        )
    problems = size_problems(
        spec.phase,
        ep=spec.comm.size,
        hidden_size=spec.hidden_size,
        top_k=spec.top_k,
        rows=spec.max_rows,
    )
    if problems:
        raise PlanError(problems)
    made = NormalDispatcher if spec.phase == "prefill" else LowLatencyDispatcher
    return made(options, spec, library)


@dataclass(frozen=True, slots=True)
class _NormalHandle:
    """What `combine` needs of a dispatch in normal mode."""

    positions_NK: Tensor
    weights_NK: Tensor
    library: Any  # DeepEP's own handle; None where no rank had rows


class NormalDispatcher:
    """High throughput. The host waits for the number of rows that come."""

    layout = ExpertLayout.CONTIGUOUS
    capturable = False

    def __init__(self, options: DeepEPOptions, spec: A2ASpec, library: ModuleType) -> None:
        self._spec = spec
        self._fp8 = options.fp8 and spec.fp8
        self._shared = shared_buffer(library, spec.comm, f"moe_a2a.{spec.phase}")
        library.Buffer.set_num_sms(options.num_sms)  # the sizes below depend on it
        ranks, row_bytes = spec.comm.size, spec.hidden_size * spec.dtype.itemsize
        configs = (
            library.Buffer.get_dispatch_config(ranks),
            library.Buffer.get_combine_config(ranks),
        )
        self._shared.need(
            spec.phase,
            Demand(
                num_sms=options.num_sms,
                nvl_bytes=max(c.get_nvl_buffer_size_hint(row_bytes, ranks) for c in configs),
                rdma_bytes=max(c.get_rdma_buffer_size_hint(row_bytes, ranks) for c in configs),
                queue_pairs=options.num_sms,
            ),
        )

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """Rows once to each rank, grouped by expert there."""
        spec = self._spec
        sent = self._spec.ops.quantize_rows(x_TE) if self._fp8 else x_TE.contiguous()
        experts_TK, weights_TK = experts_TK.contiguous(), weights_TK.contiguous()
        if sum(counts) == 0:
            came, local_NK, weights_NK, num_pairs, handle = sent, experts_TK, weights_TK, 0, None
        else:
            buffer = self._shared.normal()
            for_rank, for_node, for_expert, goes_TR, _ = buffer.get_dispatch_layout(
                experts_TK, spec.num_experts
            )
            came, local_NK, weights_NK, expert_counts, handle, _ = buffer.dispatch(
                sent,
                num_tokens_per_rank=for_rank,
                num_tokens_per_rdma_rank=for_node,
                is_token_in_rank=goes_TR,
                num_tokens_per_expert=for_expert,
                topk_idx=experts_TK,
                topk_weights=weights_TK,
            )
            num_pairs = sum(expert_counts)
        came_NE, scales = came if self._fp8 else (came, None)
        grouping = spec.ops.group_rows(local_NK, spec.num_local_experts, num_pairs)
        return Dispatched(
            came_NE[grouping.source],
            grouping.counts_L,
            _NormalHandle(grouping.positions_TK, weights_NK, handle),
            None if scales is None else scales[grouping.source],
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sums of each rank's experts, added up by DeepEP (which weighs nothing here)."""
        handle = dispatched.handle
        assert isinstance(handle, _NormalHandle)
        sums_NE = self._spec.ops.sum_results(
            output, handle.positions_NK, handle.weights_NK, self._spec.dtype
        )
        if handle.library is None:
            return sums_NE
        combined_TE, _, _ = self._shared.normal().combine(sums_NE, handle.library)
        return combined_TE  # type: ignore[no-any-return]  # the package has no types


@dataclass(frozen=True, slots=True)
class _LowLatencyHandle:
    """What `combine` needs of a dispatch in low-latency mode."""

    experts_TK: Tensor
    weights_TK: Tensor
    library: Any  # DeepEP's own handle; None where no rank had rows


class LowLatencyDispatcher:
    """Fixed places for each expert, no waiting by the host, one message for each row and expert."""

    layout = ExpertLayout.BATCHED
    capturable = False

    def __init__(self, options: DeepEPOptions, spec: A2ASpec, library: ModuleType) -> None:
        self._spec = spec
        self._fp8 = options.fp8 and spec.fp8
        limit = options.low_latency_max_rows or spec.max_rows
        if limit < spec.max_rows:
            raise ConfigError(
                f"moe_a2a.{spec.phase}.options.low_latency_max_rows={limit}, but a decode step can "
                f"have {spec.max_rows} rows of a rank; raise it (at most {LOW_LATENCY_ROWS}) or "
                "lower engine.max_running_requests"
            )
        self._max_rows = -(-limit // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        ranks = spec.comm.size
        self._shared = shared_buffer(library, spec.comm, f"moe_a2a.{spec.phase}")
        self._shared.need(
            spec.phase,
            Demand(
                num_sms=options.num_sms,
                rdma_bytes=library.Buffer.get_low_latency_rdma_size_hint(
                    self._max_rows, spec.hidden_size, ranks, spec.num_experts
                ),
                queue_pairs=spec.num_local_experts,
                low_latency_rows=self._max_rows,
            ),
        )

    def dispatch(
        self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, counts: Sequence[int]
    ) -> Dispatched:
        """Rows to the places of their experts; DeepEP makes them float8 itself."""
        spec = self._spec
        assert max(counts) <= self._max_rows, f"{counts} rows, buffers hold {self._max_rows}"
        experts_TK, weights_TK = experts_TK.contiguous(), weights_TK.contiguous()
        if sum(counts) == 0:
            return self._nothing(x_TE, experts_TK, weights_TK)
        came, counts_L, handle, _, receive = self._buffer().low_latency_dispatch(
            x_TE.contiguous(),
            experts_TK,
            self._max_rows,
            spec.num_experts,
            use_fp8=self._fp8,
            return_recv_hook=True,
        )
        receive()
        hidden_LCE, scales = came if self._fp8 else (came, None)
        return Dispatched(
            hidden_LCE,
            counts_L.long(),
            _LowLatencyHandle(experts_TK, weights_TK, handle),
            None if scales is None else scales.contiguous(),  # they come column by column
        )

    def combine(self, output: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sums, in a tensor of its own: DeepEP's are overwritten two calls later."""
        handle = dispatched.handle
        assert isinstance(handle, _LowLatencyHandle)
        num_rows = handle.experts_TK.shape[0]
        out_TE = output.new_empty(num_rows, self._spec.hidden_size)
        if handle.library is None:
            return out_TE
        _, _, receive = self._buffer().low_latency_combine(
            output.contiguous(),
            handle.experts_TK,
            handle.weights_TK,
            handle.library,
            return_recv_hook=True,
            out=out_TE,
        )
        receive()
        return out_TE

    def _buffer(self) -> Any:
        spec = self._spec
        return self._shared.low_latency(self._max_rows, spec.hidden_size, spec.num_experts)

    def _nothing(self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """A step without rows on any rank, which all ranks know."""
        num_local, hidden_size = self._spec.num_local_experts, self._spec.hidden_size
        hidden_LCE = x_TE.new_empty(num_local, 0, hidden_size)
        scales = x_TE.new_empty(num_local, 0, num_blocks(hidden_size), dtype=torch.float32)
        return Dispatched(
            hidden_LCE.to(FP8) if self._fp8 else hidden_LCE,
            experts_TK.new_zeros(num_local),
            _LowLatencyHandle(experts_TK, weights_TK, None),
            scales if self._fp8 else None,
        )
