"""The vocabulary over more ranks than divide it, some of which hold nothing."""

import pytest
import torch

from core.interfaces.comm import Comms
from core.interfaces.model import BuildContext
from core.kernels.torch_ops import TorchOps
from core.layers.embedding import LMHead, VocabEmbedding
from core.loading.dummy import DummyReader
from tests.support.models import CPU, ignore_progress
from tests.support.ranks import run_ranks, tp_comms

IDS = torch.tensor([4, 0, 2, 2, 1, 3])


def embed_and_score(comms: Comms) -> tuple[torch.Tensor, torch.Tensor]:
    reader = DummyReader(0, torch.float32, CPU, ignore_progress)
    context = BuildContext(
        weights=reader, comms=comms, ops=TorchOps(), dtype=torch.float32, device=CPU
    )
    embedding = VocabEmbedding(context, "embed", 5, 8)
    hidden = embedding(IDS.clone())
    tied = LMHead(context, embedding.weight_LE, 5)(hidden)
    own = LMHead.from_checkpoint(context, "head", 5, 8)(hidden)
    return hidden, torch.cat((tied, own))


@pytest.mark.parametrize("tp", [2, 3, 4, 5, 7])
def test_any_number_of_ranks_gives_the_same(tp: int) -> None:
    hidden, logits = embed_and_score(tp_comms(1)[0])
    assert hidden.abs().min() > 0
    for found_hidden, found_logits in run_ranks(tp_comms(tp), embed_and_score):
        assert torch.equal(found_hidden, hidden)
        torch.testing.assert_close(found_logits, logits)
