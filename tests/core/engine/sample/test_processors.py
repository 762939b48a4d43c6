"""The chain of logits processors, against plain torch, on one rank and cut over two."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

import core.engine.sample.choosing as choosing
from core.engine.sample.choosing import make_chooser
from core.engine.sample.processors import ProcessorChain
from core.engine.sample.sampler import Sampler
from core.engine.step.batch import SlotState
from core.engine.step.forward import ComputedStep
from core.errors import PluginError
from core.interfaces.comm import Comms
from core.interfaces.messages import SamplingParams, SlotInit
from core.interfaces.model import VocabularyPart
from core.interfaces.sampling import ProcessedRows, ProcessorSpec
from core.testing.ranks import run_ranks, tp_comms

CPU = torch.device("cpu")
VOCAB, ROWS = 11, 6  # 6 columns on the first of two ranks, 5 and one of padding on the second


@dataclass
class Ids:
    ids: list[int]


class Kind:
    """A kind that builds itself; counts its calls."""

    params = Ids
    needs_whole_rows = False
    is_mask = False

    def __init__(self) -> None:
        self.asked: dict[int, Ids] = {}
        self.calls = 0

    def check(self, params: Ids, vocab_size: int) -> None:
        pass

    def build(self, spec: ProcessorSpec) -> "Kind":
        return self

    def init_slot(self, slot: int, num_prompt: int, params: Ids) -> None:
        self.asked[slot] = params

    def apply(self, logits_PX: Tensor, rows: ProcessedRows) -> None:
        self.calls += 1
        assert logits_PX.is_contiguous()
        assert logits_PX.dtype == torch.float32
        for row, slot in enumerate(rows.slots_P.tolist()):
            for token in self.asked[slot].ids:
                if 0 <= token - rows.first_id < rows.num_tokens:
                    self.edit(logits_PX[row], token - rows.first_id)
        self.after(logits_PX)

    def edit(self, logits_X: Tensor, column: int) -> None:
        raise NotImplementedError

    def after(self, logits_PX: Tensor) -> None:
        pass


class Bans(Kind):
    is_mask = True

    def edit(self, logits_X: Tensor, column: int) -> None:
        logits_X[column] = -torch.inf


class Raises(Kind):
    def edit(self, logits_X: Tensor, column: int) -> None:
        logits_X[column] += 9.0


class Reverses(Kind):
    """Needs whole rows: the worst token becomes the best."""

    needs_whole_rows = True

    def after(self, logits_PX: Tensor) -> None:
        assert logits_PX.shape[1] == VOCAB
        logits_PX.copy_(logits_PX.flip(-1))


class Fails(Kind):
    def apply(self, logits_PX: Tensor, rows: ProcessedRows) -> None:
        raise KeyError("no such table")


ASKED = [
    {},
    {"bans": {"ids": [3, 10]}},
    {"raises": {"ids": [7]}},
    {"raises": {"ids": [2, 8]}, "bans": {"ids": [8]}},  # the mask has the last word
    {},
    {"bans": {"ids": [token for token in range(VOCAB) if token != 4]}},
]


def expected(logits_RV: Tensor, asked: list[dict]) -> Tensor:
    """Plain: a loop over rows of a copy."""
    edited = logits_RV.clone()
    for row, names in enumerate(asked):
        edited[row, names.get("raises", Ids([]).__dict__)["ids"]] += 9.0
        if "reverses" in names:
            edited[row] = edited[row].flip(-1)
        edited[row, names.get("bans", Ids([]).__dict__)["ids"]] = -torch.inf
    return edited


@dataclass
class Head:
    part: VocabularyPart


@dataclass
class Ran:
    ids: list[int]
    gathered: list[int] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


def sampler_of(kinds: dict[str, Kind], asked: list[dict], **params: float) -> Sampler:
    spec = ProcessorSpec(max_slots=len(asked), vocab_size=VOCAB, device=CPU)
    sampler = Sampler(
        max_slots=len(asked),
        vocab_size=VOCAB,
        device=CPU,
        eos_ids=[],
        processors=ProcessorChain(kinds, spec),
    )
    enter(sampler, asked, **params)
    return sampler


def enter(sampler: Sampler, asked: list[dict], **params: float) -> None:
    sampler.init_slots(
        [
            SlotInit(
                slot, [1], 1, SamplingParams(max_tokens=9, logits_processors=names, **params), slot
            )
            for slot, names in enumerate(asked)
        ]
    )


def run(logits_RV: Tensor, asked: list[dict], num_ranks: int, **params: float) -> Ran:
    """What ranks that each have some columns choose; all must choose the same."""
    gathered: list[int] = []
    width = -(-VOCAB // num_ranks)
    padded = torch.nn.functional.pad(logits_RV, (0, width * num_ranks - VOCAB), value=99.0)

    def of_rank(comms: Comms) -> Ran:
        tp = comms.axes["tp"]
        kinds = {"bans": Bans(), "raises": Raises(), "reverses": Reverses()}
        sampler = sampler_of(kinds, asked, **params)
        state = SlotState(num_slots=len(asked), max_tokens=8, page_size=4, device=CPU)
        first = width * tp.rank
        head = Head(VocabularyPart(tp, first, min(width, VOCAB - first)))
        part_RL = padded[:, first : first + width].clone()

        def whole() -> Tensor:
            gathered.append(tp.rank)
            return logits_RV.clone()

        slots = np.arange(len(asked))
        step = ComputedStep(
            None, whole, lambda: part_RL, None, slots, np.ones_like(slots), lambda ids: None
        )
        chooser = make_chooser(sampler, state, tp, head, shares_head=False)
        ids_R, _ = chooser.choose(step, None, [None] * len(asked))
        assert torch.equal(part_RL, padded[:, first : first + width])  # left as it was
        return Ran(ids_R.tolist(), gathered, {name: kind.calls for name, kind in kinds.items()})

    first, *others = run_ranks(tp_comms(num_ranks), of_rank)
    assert all(other.ids == first.ids for other in others)
    return first


@pytest.fixture
def logits_RV(monkeypatch) -> Tensor:
    monkeypatch.setattr(choosing, "FEW_LOGITS", 0)
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_rows_take_the_best_of_what_processors_leave(logits_RV, num_ranks):
    ran = run(logits_RV, ASKED, num_ranks, temperature=0.0)
    assert ran.ids == expected(logits_RV, ASKED).argmax(-1).tolist()
    assert ran.ids != logits_RV.argmax(-1).tolist()
    assert ran.calls == {"bans": 1, "raises": 1, "reverses": 0}
    assert ran.gathered == ([0] if num_ranks == 1 else [])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_drawn_rows_are_those_of_the_edited_logits(logits_RV, num_ranks):
    plain = sampler_of({}, [{}] * ROWS, temperature=1.3, top_p=0.95)
    plan = plain.prepare(range(ROWS), [1] * ROWS)
    tokens_SL = torch.zeros(ROWS, 8, dtype=torch.int32)
    reference = plain.sample(plan, expected(logits_RV, ASKED), tokens_SL).tolist()
    assert run(logits_RV, ASKED, num_ranks, temperature=1.3, top_p=0.95).ids == reference


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_processor_of_whole_rows_makes_its_step_gather(logits_RV, num_ranks):
    asked = [*ASKED[:4], {"reverses": {"ids": []}, "bans": {"ids": [0]}}, {}]
    ran = run(logits_RV, asked, num_ranks, temperature=0.0)
    assert ran.ids == expected(logits_RV, asked).argmax(-1).tolist()
    assert sorted(ran.gathered) == list(range(num_ranks))


def test_rows_that_ask_for_nothing_call_nothing(logits_RV):
    bans = Bans()
    sampler = sampler_of({"bans": bans, "raises": Raises()}, ASKED, temperature=0.0)
    slots = np.array([0, 4])
    assert sampler.is_greedy(slots)
    plan = sampler.prepare(slots, [1, 1])
    assert plan.processors == ()
    tokens_SL = torch.zeros(ROWS, 8, dtype=torch.int32)
    assert (
        sampler.sample(plan, logits_RV[:2], tokens_SL).tolist() == logits_RV[:2].argmax(-1).tolist()
    )
    assert bans.calls == 0
    assert not sampler.is_greedy(np.array([0, 1]))
    assert not SamplingParams(max_tokens=1, temperature=0.0, logits_processors=ASKED[1]).takes_best


def test_the_next_request_of_a_slot_starts_anew(logits_RV):
    sampler = sampler_of({"bans": Bans(), "raises": Raises()}, ASKED, temperature=0.0)
    enter(sampler, [{}] * ROWS, temperature=0.0)
    assert sampler.is_greedy(np.arange(ROWS))
    enter(sampler, [{}, {"raises": {"ids": [5]}}], temperature=0.0)
    plan = sampler.prepare([1], [1])
    assert [applied.name for applied in plan.processors] == ["raises"]


def test_errors_name_the_processor(logits_RV):
    sampler = sampler_of({"fails": Fails()}, [{"fails": {"ids": []}}], temperature=0.0)
    plan = sampler.prepare([0], [1])
    with pytest.raises(PluginError, match=r"'fails' failed in apply: KeyError"):
        sampler.sample(plan, logits_RV[:1], torch.zeros(1, 8, dtype=torch.int32))
