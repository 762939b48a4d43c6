"""The logits processors of a rank: which rows asked for which, in the order of the chain.

Shape legend: as in core.engine.sample.sampler; P rows that asked for one processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.engine.sample.vocabulary import Vocabulary
from core.engine.step.batch import Ints, send
from core.errors import PluginError
from core.interfaces.messages import SlotInit
from core.interfaces.sampling import (
    LogitsProcessor,
    LogitsProcessorKind,
    ProcessedRows,
    ProcessorSpec,
    read_params,
)


@dataclass(frozen=True, slots=True)
class _Link:
    """One processor of the chain; `slots` are those whose request names it."""

    name: str
    kind: LogitsProcessorKind
    processor: LogitsProcessor
    slots: set[int]


@dataclass(frozen=True, slots=True)
class Applied:
    """One processor's part in a step."""

    name: str
    processor: LogitsProcessor
    rows_P: Tensor | None  # on the device; None: all rows
    slots_P: Ints
    positions_P: Ints

    def edit_(self, logits_RX: Tensor, over: Vocabulary, tokens_SL: Tensor) -> None:
        """Apply to its rows of a `Vocabulary.copy`, in place."""
        logits_RX = over.own_columns(logits_RX)
        rows = ProcessedRows(
            slots_P=self.slots_P,
            positions_P=self.positions_P,
            tokens_SL=tokens_SL,
            first_id=over.first_id,
            num_tokens=logits_RX.shape[1],
        )
        logits_PX = logits_RX if self.rows_P is None else logits_RX[self.rows_P]
        logits_PX = logits_PX.contiguous()
        try:
            self.processor.apply(logits_PX, rows)
        except Exception as error:  # whatever a third party's code raises
            raise _failed(self.name, "apply", error) from error
        if self.rows_P is not None:
            logits_RX.index_copy_(0, self.rows_P, logits_PX)
        elif logits_PX.data_ptr() != logits_RX.data_ptr():
            logits_RX.copy_(logits_PX)


class ProcessorChain:
    """Processors by name; those that mask come last, else the order is that of `kinds`."""

    def __init__(self, kinds: Mapping[str, LogitsProcessorKind], spec: ProcessorSpec) -> None:
        self._device = spec.device
        self._links = [
            _Link(name, kind, _built(name, kind, spec), set())
            for name, kind in sorted(kinds.items(), key=lambda item: item[1].is_mask)
        ]

    def init_slot(self, init: SlotInit) -> tuple[bool, bool]:
        """Whether any processor is asked for, and whether one needs whole rows."""
        asked = init.sampling.logits_processors
        for link in self._links:
            link.slots.discard(init.slot)
            if link.name not in asked:
                continue
            try:
                params = read_params(link.kind, asked[link.name])
                link.processor.init_slot(init.slot, init.num_prompt, params)
            except Exception as error:  # whatever a third party's code raises
                raise _failed(link.name, "init_slot", error) from error
            link.slots.add(init.slot)
        named = [link for link in self._links if link.name in asked]
        assert len(named) == len(asked), f"processors that nobody checked: {sorted(asked)}"
        return bool(named), any(link.kind.needs_whole_rows for link in named)

    def prepare(self, slots_R: Ints, positions_R: Ints) -> tuple[Applied, ...]:
        """Who does what in a step some of whose rows asked for something."""
        found = []
        for link in self._links:
            rows = np.array(
                [r for r, s in enumerate(slots_R.tolist()) if s in link.slots], np.int64
            )
            if not len(rows):
                continue
            on_device = None if len(rows) == len(slots_R) else send(self._device, rows)[0]
            found.append(
                Applied(link.name, link.processor, on_device, slots_R[rows], positions_R[rows])
            )
        return tuple(found)


def no_processors(device: torch.device) -> ProcessorChain:
    """A chain of none."""
    return ProcessorChain({}, ProcessorSpec(max_slots=0, vocab_size=0, device=device))


def edit_all_(
    applied: Sequence[Applied], logits_RX: Tensor, over: Vocabulary, tokens_SL: Tensor
) -> None:
    """Apply a step's processors one after the other, in place."""
    for each in applied:
        each.edit_(logits_RX, over, tokens_SL)


def _built(name: str, kind: LogitsProcessorKind, spec: ProcessorSpec) -> LogitsProcessor:
    try:
        return kind.build(spec)
    except Exception as error:  # whatever a third party's code raises
        raise _failed(name, "build", error) from error


def _failed(name: str, where: str, error: Exception) -> PluginError:
    return PluginError(
        f"logits processor {name!r} failed in {where}: {type(error).__name__}: {error}\n"
        "fix or uninstall the plugin that registers it, or block it with plugins.blocklist"
    )
