"""What the engine asks of a model's forward, and what it says to one that does otherwise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.engine.step.batch import Batch, SlotState
from core.engine.step.forward import RankParts
from core.errors import PluginError
from core.interfaces.model import ModelStep
from core.parallel.layout import Layout
from core.parallel.plan import Plan
from core.parallel.rows import StepRows, solo_rows

CPU = torch.device("cpu")
IDS_T = torch.arange(5)
LAST_R, NUM_REAL = torch.tensor([1, 4]), torch.tensor([2], dtype=torch.int32)


class AllRows:
    """A model that has not heard of wanted rows."""

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        return input_ids_T[:, None].float()


class WantedAlone(AllRows):
    def forward(self, input_ids_T: Tensor, positions_T: Tensor, step: ModelStep) -> Tensor:
        hidden_TE = super().forward(input_ids_T, positions_T, step)
        return hidden_TE if step.wanted is None else hidden_TE[step.wanted.index_R]


class NoAttention:
    def step(self, batch: Batch, rows: StepRows, phase: str) -> ModelStep:
        nothing: Any = self
        return ModelStep(nothing, nothing, rows, phase, batch.num_real)


def parts_of(model: Any, plan: Plan | None = None, stream: Layout = Layout.REPLICATED) -> RankParts:
    attention: Any = NoAttention()
    state = SlotState(num_slots=1, max_tokens=8, page_size=4, device=CPU)
    return RankParts(
        model=model,
        attention=attention,
        state=state,
        plan=plan or Plan(),
        rank=0,
        stream=stream,
    )


def batch() -> Batch:
    num_real = torch.tensor([5], dtype=torch.int32)
    return Batch(IDS_T, IDS_T, IDS_T, num_real, 0, None, None)


def test_wanted_rows_are_what_comes_back() -> None:
    parts = parts_of(WantedAlone())
    wanted = parts.wanted(LAST_R, NUM_REAL, [2])
    assert parts.forward(batch(), solo_rows(5), "prefill", wanted).flatten().tolist() == [1, 4]
    assert parts.forward(batch(), solo_rows(5), "prefill").shape == (5, 1)


def test_a_model_that_gives_other_rows_is_told() -> None:
    parts = parts_of(AllRows())
    with pytest.raises(
        PluginError, match=r"AllRows\.forward returned 5 rows .* where 2 are wanted"
    ):
        parts.forward(batch(), solo_rows(5), "prefill", parts.wanted(LAST_R, NUM_REAL, [2]))


def test_ranks_that_share_out_rows_compute_all() -> None:
    plan = Plan(tp_attn=2, ep=2)
    assert parts_of(AllRows(), plan, Layout.ROWS).wanted(LAST_R, NUM_REAL, [2]) is None


@pytest.mark.parametrize(
    ("plan", "stream"),
    [(Plan(dp=2, ep=2), Layout.ROWS), (Plan(dp=2, tp_expert=2), Layout.REPLICATED)],
    ids=["ep", "tp"],
)
def test_dp_ranks_know_how_many_rows_the_others_want(plan: Plan, stream: Layout) -> None:
    wanted = parts_of(AllRows(), plan, stream).wanted(LAST_R, NUM_REAL, [2, 0])
    assert wanted is not None
    assert wanted.rows.by_dp == (2, 0)
