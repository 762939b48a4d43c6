"""Which ranks choose tokens, and that an engine's answers are the same either way."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import core.engine.build.runner as build
import core.engine.sample.choosing as choosing
from core.engine.sample.choosing import OneForAll, RanksTogether, make_chooser
from core.engine.sample.sampler import Sampler
from core.engine.step.batch import SlotState
from core.engine.step.forward import ComputedStep
from core.interfaces.comm import AxisPlace, Comms
from core.interfaces.messages import SamplingParams, SlotInit
from core.interfaces.model import VocabularyPart
from core.settings.config import PluginChoice
from core.testing.ranks import run_ranks, tp_comms
from tests.support.engine import CPU, app_config, folder_model, spread_engine
from tests.support.models import VOCAB_SIZE

KINDS = [
    {"temperature": 0.0},
    {"seed": 5},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"top_k": 4, "top_p": 0.7, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"repetition_penalty": 1.3, "min_tokens": 4, "min_p": 0.05},
    {"temperature": 0.0, "frequency_penalty": 0.6, "logit_bias": {9: 3.0, 200: 4.0}},
]


@dataclass
class Head:
    """An output head, as far as it is asked here."""

    part: VocabularyPart


@pytest.fixture
def chosen_by(monkeypatch):
    """The choosers of engines built from now on; `one` makes them all OneForAll."""

    class Made(list):
        one = False

    made = Made()

    def make(sampler, state, comm, head, *, shares_head):
        shares_head |= made.one
        made.append(make_chooser(sampler, state, comm, head, shares_head=shares_head))
        return made[-1]

    monkeypatch.setattr(build, "make_chooser", make)
    monkeypatch.setattr(choosing, "FEW_LOGITS", 0)
    return made


def test_ranks_choose_together_where_they_know_all_rows() -> None:
    sampler = Sampler(max_slots=1, vocab_size=10, device=CPU, eos_ids=[])
    state = SlotState(num_slots=1, max_tokens=8, page_size=4, device=CPU)

    def chooser(num_ranks: int, *, shares_head: bool = False) -> type:
        comm = AxisPlace(0, num_ranks)
        head = Head(VocabularyPart(comm, 0, 5))
        return type(make_chooser(sampler, state, comm, head, shares_head=shares_head))

    assert chooser(1) is OneForAll
    assert chooser(2) is RanksTogether
    assert chooser(2, shares_head=True) is OneForAll
    # A head that does not say which columns its ranks have.
    silent = make_chooser(sampler, state, AxisPlace(0, 2), object(), shares_head=False)
    assert type(silent) is OneForAll


@pytest.mark.parametrize(
    ("num_rows", "temperature", "gathers"),
    [
        (2, 1.0, True),
        (3, 1.0, False),
        (2, 0.0, False),
    ],
)
def test_logits_of_few_rows_that_draw_are_gathered(monkeypatch, num_rows, temperature, gathers):
    monkeypatch.setattr(choosing, "FEW_LOGITS", 20)
    params = SamplingParams(max_tokens=9, temperature=temperature, presence_penalty=0.5)
    gathered = []

    def of_rank(comms: Comms) -> list[int]:
        tp = comms.axes["tp"]
        sampler = Sampler(max_slots=3, vocab_size=10, device=CPU, eos_ids=[])
        sampler.init_slots([SlotInit(slot, [1], 1, params, slot) for slot in range(3)])
        state = SlotState(num_slots=3, max_tokens=8, page_size=4, device=CPU)
        head = Head(VocabularyPart(tp, 5 * tp.rank, 5))
        logits_RL = torch.arange(5.0).repeat(num_rows, 1) + 5 * tp.rank

        def whole() -> Tensor:
            gathered.append(tp.rank)
            return tp.all_gather(logits_RL, 1)

        slots, stored = np.arange(num_rows), []
        step = ComputedStep(
            None, whole, lambda: logits_RL, None, slots, np.ones_like(slots), stored.append
        )
        chooser = make_chooser(sampler, state, tp, head, shares_head=False)
        ids_R, logprobs = chooser.choose(step, None, [None] * num_rows)
        assert logprobs is None
        assert torch.equal(stored[0], ids_R)
        return ids_R.tolist()

    first, second = run_ranks(tp_comms(2), of_rank)
    assert first == second
    assert sorted(gathered) == ([0, 1] if gathers else [])


GROUPS = {"plan": "dp_attention", "tp": 4, "ep": 2, "dp_attention": 2}
PLANS = {
    "tp2": ("llama", {"plan": "tp", "tp": 2}, RanksTogether),
    "tp4": ("llama", {"plan": "tp", "tp": 4}, RanksTogether),
    "own_heads": ("qwen3_moe", GROUPS | {"dp_lm_head": True}, RanksTogether),
    "shared_head": ("qwen3_moe", GROUPS, OneForAll),
}


@pytest.mark.parametrize("name", list(PLANS))
def test_answers_are_the_same(tiny_folder, chosen_by, name):
    family, parallel, expected = PLANS[name]
    carries = PluginChoice(name="allgather")
    prompts = [
        [(7 * index + at) % (VOCAB_SIZE - 10) for at in range(1 + index)]
        for index in range(len(KINDS))
    ]
    sampling = [SamplingParams(max_tokens=8, ignore_eos=True, **kind) for kind in KINDS]

    def answers():
        config = app_config(
            folder_model(tiny_folder(family), max_model_len=64),
            engine={"page_size": 4, "kv_cache_tokens": 512, "max_running_requests": 8},
            parallel=parallel,
            moe_a2a={"prefill": carries, "decode": carries},
        )
        with spread_engine(config) as engine:
            return engine.generate(prompts, sampling)

    found = answers()
    assert {type(chooser) for chooser in chosen_by} == {expected}
    chosen_by.one = True
    for mine, other in zip(found, answers(), strict=True):
        assert mine.token_ids == other.token_ids
        for entry, reference in zip(mine.logprobs, other.logprobs, strict=True):
            assert (entry.token_id, entry.rank) == (reference.token_id, reference.rank)
            assert entry.top_ids == reference.top_ids
            assert entry.logprob == pytest.approx(reference.logprob, abs=1e-5)
            assert entry.top_logprobs == pytest.approx(reference.top_logprobs, abs=1e-5)
    assert [len(answer.logprobs) for answer in found] == [
        8 if "logprobs" in kind else 0 for kind in KINDS
    ]
