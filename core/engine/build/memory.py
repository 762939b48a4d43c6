"""What fits in memory: the weights, what steps need, then the KV pool, whose tensors are made here.

On a GPU everything is counted before the first request, so that no step runs out of memory: the
pool gets what weights, the largest steps (measured by running them), CUDA graphs and a margin
leave. Knows nothing of who uses which page.

Shape legend: N pages, P tokens in a page, G KV heads of this rank, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.devices.cpu.host_memory import available_bytes
from core.errors import ResourceError
from core.interfaces.attention import LayerKV
from core.interfaces.model import KVShape, LatentKVShape
from core.settings.config import EngineConfig

GIB = 1024**3
# On a CPU the pool competes with everything else on the host, so that it is bounded unless
# engine.kv_cache_tokens asks for more: for all ranks together, and to a share of what is free.
CPU_POOL_BYTES = 4 * GIB
CPU_POOL_SHARE = 0.5
# Of a GPU, for what torch doesn't count: the CUDA context, code of kernels, buffers of libraries.
MARGIN_BYTES = GIB
# A captured step's nodes and parameters, beside the memory that it works in.
GRAPH_BYTES = 16 * 1024**2


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Pages of the pool (the scratch page 0 included) and their bytes on this rank."""

    num_pages: int
    page_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.num_pages * self.page_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMemory:
    """What one rank holds of its GPU beside the KV pool, in bytes. All zero where nothing was
    measured (CPU)."""

    weights: int = 0
    state: int = 0  # of slots and samplers, buffers of backends
    activations: int = 0  # of the largest step, what the allocator can't use between included
    graphs: int = 0  # expected, before they are captured

    @property
    def total(self) -> int:
        """Without the margin."""
        return self.weights + self.state + self.activations + self.graphs

    def text(self) -> str:
        """Every share, for errors."""
        return (
            f"weights {self.weights / GIB:.2f}, slots and buffers {self.state / GIB:.2f}, "
            f"activations of the largest step {self.activations / GIB:.2f}, CUDA graphs "
            f"{self.graphs / GIB:.2f}, margin {MARGIN_BYTES / GIB:.2f} GiB"
        )


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes the pool may take, and why, as the end of a sentence."""

    num_bytes: int
    reason: str
    advice: str


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Memory this rank may take: the device's free memory, on a CPU shared by its ranks."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes() // local_ranks


def check_weights_fit(
    weight_bytes: int, device: torch.device, local_ranks: int, *, widened: bool = False
) -> None:
    """Raise ResourceError where a rank's weights can't be held; called before they are read.
    `widened`: a part of them is a copy in 16 bits that can be left out."""
    available = free_bytes(device, local_ranks)
    if weight_bytes > available:
        raise ResourceError(
            f"the weights need {weight_bytes / GIB:.1f} GiB on each rank, but only "
            f"{available / GIB:.1f} GiB are free on {device}; use "
            f"{'model.quantized_weights=keep, ' if widened else ''}more ranks (parallel.tp), "
            f"{'' if widened else 'model.dtype=bfloat16, '}or a smaller model"
        )


def page_bytes(config: EngineConfig, kv: KVShape | LatentKVShape, dtype: torch.dtype) -> int:
    """Bytes of a page in all layers of a rank."""
    return kv.num_layers * kv.token_values * dtype.itemsize * config.settled_page_size


def plan_pool(
    config: EngineConfig,
    kv: KVShape | LatentKVShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    local_ranks: int,
    held: HeldMemory,
) -> PoolSize:
    """How many pages the pool gets, called when the weights are loaded and `held` is measured.

    Raises ResourceError where the memory does not hold what was asked for, or not a page.
    """
    page_size = config.settled_page_size
    bytes_of_page = page_bytes(config, kv, dtype)
    budget = _budget(config, device, local_ranks, held)
    if config.kv_cache_tokens is not None:
        num_pages = config.kv_cache_tokens // page_size + 1
        if num_pages * bytes_of_page > budget.num_bytes:
            raise ResourceError(
                f"engine.kv_cache_tokens={config.kv_cache_tokens} needs "
                f"{num_pages * bytes_of_page / GIB:.2f} GiB for the KV pool on each rank, but "
                f"{budget.reason}; lower engine.kv_cache_tokens to at most "
                f"{max(0, (budget.num_bytes // bytes_of_page - 1) * page_size)}, or {budget.advice}"
            )
        return PoolSize(num_pages, bytes_of_page)
    num_bytes = budget.num_bytes
    if device.type == "cpu":
        share = int(free_bytes(device, local_ranks) * CPU_POOL_SHARE)
        num_bytes = min(num_bytes, CPU_POOL_BYTES // local_ranks, share)
    pages_of_one = -(-max_model_len // page_size)
    useful_pages = config.running_limit * pages_of_one + 1
    num_pages = min(num_bytes // bytes_of_page, useful_pages)
    if num_pages < min(pages_of_one, 64) + 1:
        raise ResourceError(
            f"no memory for the KV pool: {budget.reason}, which holds {max(0, num_pages)} pages of "
            f"{bytes_of_page / 1024:.0f} KiB; {budget.advice}, lower model.max_model_len, or use "
            "more ranks (parallel.tp)"
        )
    return PoolSize(num_pages, bytes_of_page)


def _budget(
    config: EngineConfig, device: torch.device, local_ranks: int, held: HeldMemory
) -> _Budget:
    fraction = f"engine.mem_fraction={config.mem_fraction}"
    if device.type != "cuda":
        available = free_bytes(device, local_ranks)
        budget = int(available * config.mem_fraction)
        return _Budget(
            budget,
            f"{fraction} of the free {available / GIB:.2f} GiB on {device} is "
            f"{budget / GIB:.2f} GiB",
            "raise engine.mem_fraction",
        )
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * config.mem_fraction) - held.total - MARGIN_BYTES
    # Weights, state and activations are taken already; graphs are not. Half of the margin is code
    # and contexts that are there by now.
    left = free - held.graphs - MARGIN_BYTES // 2
    others = "" if share <= left else ", and other processes hold a part of the device"
    budget = min(share, left)
    return _Budget(
        budget,
        f"{fraction} of the {total / GIB:.2f} GiB of {device} leaves {budget / GIB:.2f} GiB "
        f"({held.text()}{others})",
        "raise engine.mem_fraction, lower engine.max_prefill_tokens or engine.max_running_requests",
    )


def allocate_pool(
    size: PoolSize, kv: KVShape, *, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKV]:
    """The pool's tensors by layer; contents undefined."""
    shape = (kv.num_layers, 2, size.num_pages, page_size, kv.num_kv_heads, kv.head_dim)
    pool = _allocate(size, shape, dtype, device)
    pool[:, :, 0].zero_()  # the scratch page is read by padded rows; it must hold no NaN
    return [LayerKV(layer[0], layer[1]) for layer in pool]


def allocate_latent_pool(
    size: PoolSize, kv: LatentKVShape, *, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The pool of a model with latent attention: (N, P, latent + rope) of each layer."""
    shape = (kv.num_layers, size.num_pages, page_size, kv.token_values)
    pool = _allocate(size, shape, dtype, device)
    pool[:, 0].zero_()
    return list(pool)


def _allocate(
    size: PoolSize, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise ResourceError(
            f"no memory for the KV pool of {size.total_bytes / GIB:.2f} GiB on {device}: "
            "lower engine.mem_fraction or engine.kv_cache_tokens"
        ) from error
