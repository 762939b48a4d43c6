"""The processor that leaves the tokens named and no others."""

import numpy as np
import pytest
import torch

from core.errors import RequestError
from core.interfaces.sampling import ProcessedRows, ProcessorSpec
from core.plugin.plugin_manager import PluginManager
from core.serve.processor_check import check_processors
from plugins.logits_processors._allowed_params import AllowedTokens
from plugins.logits_processors.allowed import NAME, AllowedTokenIds

VOCAB = 7
KINDS = {NAME: AllowedTokenIds()}


def test_it_is_there_without_being_asked_for():
    table = PluginManager.load(builtins=["plugins.logits_processors"]).table("logits_processor")
    assert list(table) == [NAME]


@pytest.mark.parametrize("parts", [[VOCAB], [4, 3], [7, 0], [2, 2, 3]])
def test_every_other_token_is_masked_wherever_its_column_is(parts):
    allowed = {2: [0, 6], 0: [3], 1: [1, 1, 5]}
    logits_PV = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = torch.full_like(logits_PV, -torch.inf)
    slots = [2, 1]
    for row, slot in enumerate(slots):
        for token in allowed[slot]:
            expected[row, token] = logits_PV[row, token]
    cpu = torch.device("cpu")
    mask = KINDS[NAME].build(ProcessorSpec(max_slots=3, vocab_size=VOCAB, device=cpu))
    for slot, ids in allowed.items():
        mask.init_slot(slot, 1, AllowedTokens(ids=ids))
    found, first_id = [], 0
    for width in parts:
        part = logits_PV[:, first_id : first_id + width].contiguous()
        mask.apply(
            part,
            ProcessedRows(
                slots_P=np.array(slots),
                positions_P=np.array([1, 1]),
                tokens_SL=torch.zeros(3, 4, dtype=torch.int32),
                first_id=first_id,
                num_tokens=width,
            ),
        )
        found.append(part)
        first_id += width
    assert torch.equal(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize(
    ("ids", "says"), [([], "ids is empty"), ([7], "allowed: 0 to 6"), ([0, -1], "holds -1")]
)
def test_what_is_wrong_is_named(ids, says):
    with pytest.raises(RequestError, match=says) as caught:
        check_processors({NAME: {"ids": ids}}, KINDS, VOCAB)
    assert caught.value.param == "logits_processors.allowed_token_ids"
