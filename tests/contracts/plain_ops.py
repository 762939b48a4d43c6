"""The operations of a layer in float64 as they are defined, for tests of every set of operations.

Shares no code with core.ops and core.devices. Shape legend: see core.interfaces.ops; F is D/2.
"""

import torch
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    out_TO = torch.einsum("...i,oi->...o", x_TI.double(), weight_OI.double())
    return out_TO if bias_O is None else out_TO + bias_O.double()


def silu_and_mul(gate_up_T2I: Tensor) -> Tensor:
    """The first half decides how much of the second goes through (SwiGLU, arXiv:2002.05202)."""
    size = gate_up_T2I.shape[-1] // 2
    gate_TI, up_TI = gate_up_T2I[..., :size].double(), gate_up_T2I[..., size:].double()
    return gate_TI * torch.sigmoid(gate_TI) * up_TI


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """arXiv:1910.07467, with eps under the root."""
    x_TE = x_TE.double()
    mean_square_T1 = (x_TE * x_TE).sum(-1, keepdim=True) / x_TE.shape[-1]
    return x_TE / (mean_square_T1 + eps).sqrt() * weight_E.double()


def rope(x_THD: Tensor, cos_sin_CR: Tensor, positions_T: Tensor) -> Tensor:
    """Pair (i, i + R/2) is a complex number turned by its row's angle (arXiv:2104.09864); values
    beyond R are in no pair."""
    size_F = cos_sin_CR.shape[1] // 2
    turns_T1F = torch.complex(
        cos_sin_CR[positions_T, :size_F].double(), cos_sin_CR[positions_T, size_F:].double()
    ).unsqueeze(1)
    first_THF, second_THF, rest_THX = x_THD.double().tensor_split((size_F, 2 * size_F), dim=-1)
    pairs_THF = torch.complex(first_THF.contiguous(), second_THF.contiguous())
    turned_THF = pairs_THF * turns_T1F
    return torch.cat((turned_THF.real, turned_THF.imag, rest_THX), dim=-1)
