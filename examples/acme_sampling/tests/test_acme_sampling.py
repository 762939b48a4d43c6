"""The mask against the processor of the same kind in transformers, whole and in parts."""

import numpy as np
import pytest
import torch
from acme_sampling.on_device import NgramMask
from acme_sampling.params import NgramParams
from transformers import NoRepeatNGramLogitsProcessor

from core.interfaces.sampling import ProcessedRows

VOCAB = 5


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("parts", [[VOCAB], [3, 2], [5, 0]])
def test_it_masks_what_transformers_masks(size: int, parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens_SL = torch.randint(VOCAB, (4, 12), generator=generator)
    slots, known = np.array([2, 0, 3]), np.array([12, 5, 2])
    logits_PV = torch.randn(len(slots), VOCAB, generator=generator)
    reference = NoRepeatNGramLogitsProcessor(size)
    expected = torch.cat(
        [
            reference(tokens_SL[None, slot, :count], logits_PV[None, row])
            for row, (slot, count) in enumerate(zip(slots, known, strict=True))
        ]
    )
    mask = NgramMask()
    for slot in slots.tolist():
        mask.init_slot(slot, num_prompt=2, params=NgramParams(size=size))
    found = [part.contiguous() for part in torch.split(logits_PV, parts, dim=1)]
    for part, first_id in zip(found, np.cumsum([0, *parts[:-1]]).tolist(), strict=True):
        mask.apply(
            part,
            ProcessedRows(
                slots_P=slots,
                positions_P=known,
                tokens_SL=tokens_SL,
                first_id=first_id,
                num_tokens=part.shape[1],
            ),
        )
    assert torch.equal(torch.cat(found, dim=1), expected)
    assert size > 2 or expected.isinf().any(), "nothing was masked"
