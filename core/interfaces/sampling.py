"""The interface of logits processors, which change logits before a token is chosen.

A processor has two parts. `LogitsProcessorKind` defines the parameters of a request. It is used
where requests are accepted, in a process without torch. `LogitsProcessor` stores the parameters of
each slot and changes logits, on every rank.

Shape legend: P rows (sequences) that use the processor, X columns of the logits on this rank, S
slots, L tokens of a slot.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSpec:
    """The sizes that a processor is built for."""

    max_slots: int  # S
    vocab_size: int
    device: "torch.device"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedRows:
    """The rows of one call. Arrays are on the host, in the order of the rows."""

    slots_P: "npt.NDArray[np.int64]"
    # Number of known tokens of each, with the prompt: the position of the token to choose.
    positions_P: "npt.NDArray[np.int64]"
    tokens_SL: "Tensor"  # int32 or int64, on the device: the known tokens of every slot
    first_id: int  # token id of column 0; column i is token first_id + i
    num_tokens: int  # X; 0 on a rank without tokens


class LogitsProcessor(Protocol):
    """A processor on one rank.

    Its results must depend only on a request's parameters, tokens and logits, so that all ranks do
    the same."""

    def init_slot(self, slot: int, num_prompt: int, params: Any) -> None:
        """A request starts in a slot (again, after a preemption).

        Called only for requests that use the processor. `params` is an instance of the kind's
        `params` type; `num_prompt` is the number of prompt tokens."""
        ...

    def apply(self, logits_PX: "Tensor", rows: ProcessedRows) -> None:
        """Change the logits in place: float32, contiguous, on the device.

        Must not wait for a GPU. If the vocabulary is cut over ranks, each rank gets its own
        columns."""
        ...


class LogitsProcessorKind(Protocol):
    """What the factory of the plugin returns. Its module must not import torch."""

    # A dataclass or msgspec struct for a request's parameters (a JSON object). A wrong type of a
    # field, or a ValueError of its __post_init__, gives the client status 400.
    params: type
    # False: the result of a column does not depend on other columns, as for bias and bans.
    # True: `apply` needs all columns. Logits are gathered, and only rank 0 calls `apply`.
    needs_whole_rows: bool
    # Masks (-inf for forbidden tokens) are applied after all that only change logits.
    is_mask: bool

    def check(self, params: Any, vocab_size: int) -> None:
        """Raise ValueError for what this model cannot do. The client gets its text."""
        ...

    def build(self, spec: ProcessorSpec) -> LogitsProcessor:
        """Build the processor of one rank. Called once, at the start."""
        ...


def read_params(kind: LogitsProcessorKind, given: Mapping[str, Any]) -> Any:
    """Convert the parameters of a request to the processor's type.

    Raises msgspec.ValidationError, which is a ValueError and names the field."""
    return msgspec.convert(given, kind.params, str_keys=True)
