"""The contract of logits processors: what a third party does to logits before a token is chosen.

A processor comes in two parts. `LogitsProcessorKind` says what a request may ask for and is read
where requests are admitted, in a process without torch. `LogitsProcessor` keeps what each slot
asked for and edits logits on every rank.

Shape legend: P rows that asked for the processor, X columns of the logits that are here, S slots, L
tokens of a slot.
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
    """What a processor is built for."""

    max_slots: int  # S
    vocab_size: int
    device: "torch.device"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedRows:
    """What the rows of one call are. Arrays are on the host, in the order of the rows."""

    slots_P: "npt.NDArray[np.int64]"
    # Tokens known of each, the prompt's included: the position of the token that is chosen.
    positions_P: "npt.NDArray[np.int64]"
    tokens_SL: "Tensor"  # int32 or int64, on the device: every slot's known tokens
    first_id: int  # the token of column 0; column i is that of first_id + i
    num_tokens: int  # X; 0 on a rank without tokens


class LogitsProcessor(Protocol):
    """One rank's. Its results follow from a request's parameters, tokens and logits alone, so that
    all ranks do the same."""

    def init_slot(self, slot: int, num_prompt: int, params: Any) -> None:
        """A request enters a slot (again, after a preemption). `params` is what the kind's `params`
        type was made of; only slots of requests that name the processor are told."""
        ...

    def apply(self, logits_PX: "Tensor", rows: ProcessedRows) -> None:
        """Change the logits in place: float32, contiguous, on the device. Never waits for a GPU.
        Where rows are cut over ranks, each rank is called with its own columns."""
        ...


class LogitsProcessorKind(Protocol):
    """What a plugin's factory returns; its module doesn't import torch."""

    # A dataclass or msgspec struct that a request's parameters (a JSON object) are read into.
    # Its fields' types, and ValueErrors of its __post_init__, are the client's 400.
    params: type
    # False: `apply` does to a column what it would do if it had all of them, as bias and bans do.
    # True: it needs them all; logits of its steps are gathered, and rank 0 alone calls `apply`.
    needs_whole_rows: bool
    # Masks (-inf for what may not come) are applied after everything that only changes logits.
    is_mask: bool

    def check(self, params: Any, vocab_size: int) -> None:
        """Raise ValueError, whose text the client reads, for what this model can't do."""
        ...

    def build(self, spec: ProcessorSpec) -> LogitsProcessor:
        """A rank's processor, once at start-up."""
        ...


def read_params(kind: LogitsProcessorKind, given: Mapping[str, Any]) -> Any:
    """What a request asks of a processor, as its type. Raises msgspec.ValidationError, which is a
    ValueError and names the field."""
    return msgspec.convert(given, kind.params, str_keys=True)
