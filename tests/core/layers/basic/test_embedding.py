"""The vocabulary over more ranks than divide it, and heads that DP ranks share."""

import pytest
import torch

from core.interfaces.comm import Comms
from core.interfaces.model import BuildContext
from core.interfaces.weights import PlainFormat
from core.layers.basic.embedding import LMHead, VocabEmbedding
from core.layers.basic.row_exchange import row_exchange
from core.ops.torch_ops import TorchOps
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows
from core.testing.ranks import plan_comms, run_ranks
from plugins.checkpoints._dummy_reader import DummyReader
from tests.support.models import CPU, ignore_progress

IDS = torch.tensor([4, 0, 2, 2, 1, 3])
NUM_VOCAB, SIZE = 5, 8


def build_context(comms: Comms, plan: Plan, stream: Layout) -> BuildContext:
    return BuildContext(
        weights=DummyReader(0, torch.float32, CPU, ignore_progress),
        comms=comms,
        ops=TorchOps(),
        dtype=torch.float32,
        device=CPU,
        format=PlainFormat(),
        stream=stream,
        head_axis="tp" if plan.dp_lm_head else "world",
    )


def embed_and_score(
    comms: Comms, plan: Plan, stream: Layout, by_dp: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of this DP rank's share of IDS, and their logits by a head of each kind."""
    context = build_context(comms, plan, stream)
    rank = comms.axes["world"].rank
    rows = StepRows(plan, rank, by_dp)
    first = sum(by_dp[: plan.axis_index("dp", rank)])
    num_rows = rows.num_padded if stream is Layout.ROWS else rows.num_real
    ids = torch.zeros(num_rows, dtype=torch.int64)
    ids[: rows.num_real] = IDS[first : first + rows.num_real]
    embedding = VocabEmbedding(context, "embed", NUM_VOCAB, SIZE)
    shared_out = embedding(ids, rows)
    hidden = row_exchange(context, "tp").gather(shared_out, rows)[: rows.num_real]
    tied = LMHead(context, embedding.weight_LE, NUM_VOCAB, axis="tp")(hidden, rows)
    own = LMHead.from_checkpoint(context, "head", NUM_VOCAB, SIZE)(hidden, rows)
    return hidden, torch.cat((tied, own), 1)


def alone() -> tuple[torch.Tensor, torch.Tensor]:
    (comms,) = plan_comms(Plan())
    return embed_and_score(comms, Plan(), Layout.REPLICATED, (len(IDS),))


@pytest.mark.parametrize("tp", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("stream", [Layout.REPLICATED, Layout.ROWS])
def test_any_number_of_ranks_gives_the_same(tp: int, stream: Layout) -> None:
    plan = Plan(tp_attn=tp, tp_expert=tp)
    hidden, logits = alone()
    assert hidden.abs().min() > 0
    assert logits.shape == (len(IDS), 2 * NUM_VOCAB)
    found = run_ranks(
        plan_comms(plan), lambda comms: embed_and_score(comms, plan, stream, (len(IDS),))
    )
    for found_hidden, found_logits in found:
        assert torch.equal(found_hidden, hidden)
        torch.testing.assert_close(found_logits, logits)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("by_dp", [(3, 3), (5, 1), (0, 6)])
def test_dp_ranks_score_their_own_rows(own_head: bool, by_dp: tuple[int, ...]) -> None:
    plan = Plan(dp=2, tp_attn=2, tp_expert=4, dp_lm_head=own_head)
    hidden, logits = alone()
    found = run_ranks(
        plan_comms(plan), lambda comms: embed_and_score(comms, plan, Layout.ROWS, by_dp)
    )
    for rank, (found_hidden, found_logits) in enumerate(found):
        first = sum(by_dp[: rank // 2])
        mine = slice(first, first + by_dp[rank // 2])
        assert torch.equal(found_hidden, hidden[mine])
        torch.testing.assert_close(found_logits, logits[mine])
