"""What fits in memory: the weights, then the KV pool, whose tensors are made here.

Knows nothing of who uses which page.

Shape legend: N pages, P tokens in a page, G KV heads of this rank, D head dimension.
"""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from core.config import EngineConfig
from core.errors import ResourceError
from core.interfaces.attention import LayerKV
from core.interfaces.model import KVShape, LatentKVShape

GIB = 1024**3
# On a CPU the pool competes with everything else on the host, so that it is bounded unless
# engine.kv_cache_tokens asks for more.
CPU_POOL_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Pages of the pool (the scratch page 0 included) and their bytes on this rank."""

    num_pages: int
    page_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.num_pages * self.page_bytes


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Memory this rank may take: the device's free memory, on a CPU shared by its ranks."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // local_ranks


def check_weights_fit(weight_bytes: int, device: torch.device, local_ranks: int) -> None:
    """Raise ResourceError where a rank's weights can't be held; called before they are read."""
    available = free_bytes(device, local_ranks)
    if weight_bytes > available:
        raise ResourceError(
            f"the weights need {weight_bytes / GIB:.1f} GiB on each rank, but only "
            f"{available / GIB:.1f} GiB are free on {device}; use more ranks (parallel.tp), "
            "model.dtype=bfloat16, or a smaller model"
        )


def plan_pool(
    config: EngineConfig,
    kv: KVShape | LatentKVShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    local_ranks: int,
) -> PoolSize:
    """How many pages the pool gets, called when the weights are loaded.

    Raises ResourceError where the memory does not hold what was asked for, or not a page.
    """
    page_size = config.page_size
    token_bytes = kv.num_layers * kv.token_values * dtype.itemsize
    page_bytes = token_bytes * page_size
    available = free_bytes(device, local_ranks)
    budget = int(available * config.mem_fraction)
    if config.kv_cache_tokens is not None:
        num_pages = config.kv_cache_tokens // page_size + 1
        if num_pages * page_bytes > budget:
            raise ResourceError(
                f"engine.kv_cache_tokens={config.kv_cache_tokens} needs "
                f"{num_pages * page_bytes / GIB:.2f} GiB for the KV pool on each rank, but "
                f"engine.mem_fraction={config.mem_fraction} of the free {available / GIB:.2f} GiB "
                f"on {device} is {budget / GIB:.2f} GiB; lower engine.kv_cache_tokens to at most "
                f"{max(0, budget // token_bytes)}, or raise engine.mem_fraction"
            )
        return PoolSize(num_pages, page_bytes)
    if device.type == "cpu":
        budget = min(budget, CPU_POOL_BYTES // local_ranks)
    pages_of_one = -(-max_model_len // page_size)
    useful_pages = config.max_running_requests * pages_of_one + 1
    num_pages = min(budget // page_bytes, useful_pages)
    if num_pages < min(pages_of_one, 64) + 1:
        raise ResourceError(
            f"no memory for the KV pool: engine.mem_fraction={config.mem_fraction} of the free "
            f"{available / GIB:.2f} GiB on {device} holds {num_pages} pages of "
            f"{page_bytes / 1024:.0f} KiB; raise engine.mem_fraction, lower model.max_model_len, "
            "or use more ranks (parallel.tp)"
        )
    return PoolSize(num_pages, page_bytes)


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
