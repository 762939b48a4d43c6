"""Opens the device a rank computes on. Knows nothing of what runs there."""

import torch

from core.errors import ResourceError


def open_device(name: str, local_rank: int) -> torch.device:
    """The torch device of `engine.device` for the `local_rank`-th rank of this host.

    Raises ResourceError where torch can't use it.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            f"engine.device={name}, but torch {torch.__version__} sees no GPU: install a CUDA "
            "build of torch and a driver that fits it, or set engine.device=cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ResourceError(
            f"rank {local_rank} of this host has no GPU of its own: torch sees {count}; lower "
            "parallel.tp or use more nodes"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
