"""The dtype that the plain torch operations compute in."""

import torch
from torch import Tensor


def accurate(x: Tensor) -> Tensor:
    """`x` in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
