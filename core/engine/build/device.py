"""Opens the device a rank computes on. Knows nothing of what runs there."""

import torch

from core.errors import ResourceError


def open_device(name: str, num_threads: int) -> torch.device:
    """The torch device `name` ("cpu", "cuda:0"), made current; CPU work uses `num_threads`.

    Raises ResourceError where torch can't use it.
    """
    torch.set_num_threads(num_threads)
    device = torch.device(name)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.empty(1, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ResourceError(
                f"torch {torch.__version__} can't use {name}: {str(error).splitlines()[0]}; check "
                "that the driver fits this build of torch, or set engine.device=cpu"
            ) from error
    return device
