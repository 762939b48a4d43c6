"""Reading of checkpoints in tests."""

import torch
from torch import Tensor

from core.interfaces.weights import WeightSource


def read_slice(
    source: WeightSource, name: str, dim: int, start: int, stop: int, staging_bytes: int = 1 << 16
) -> Tensor:
    """Entries `start:stop` along `dim` of a stored tensor."""
    info = source.tensors()[name]
    staging = torch.empty(staging_bytes, dtype=torch.uint8)
    pieces = [rows.clone() for rows in source.stream(name, dim, start, stop, staging)]
    shape = list(info.shape)
    if shape:
        shape[dim] = stop - start
    rows = torch.cat(pieces) if pieces else torch.empty(0, dtype=info.dtype)
    return rows.view(shape)
