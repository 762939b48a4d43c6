"""A vocabulary that is cut over ranks against one rank that has all of it: the same tokens exactly,
log-probabilities to float32's rounding, and little that travels.

Ranks are threads. Padding columns hold the largest logits of all, so that one that counted would
be chosen.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import core.engine.sample.sampler as sampler_module
from core.engine.sample import operations as sampling
from core.engine.sample.cut_vocabulary import EDGES, ROUNDS, CutVocabulary
from core.engine.sample.logprobs import sampled_logprobs
from core.engine.sample.operations import Filter, filter_thresholds, relative_probabilities
from core.engine.sample.sampler import Sampler
from core.engine.sample.vocabulary import WholeVocabulary
from core.interfaces.comm import Comms, Communicator
from core.interfaces.messages import SamplingParams, SlotInit
from core.parallel.sharding import Sharding
from core.testing.ranks import run_ranks, tp_comms
from plugins.comm.emulated import EmulatedCommunicator

CPU = torch.device("cpu")
EOS, PROMPT = 3, 4
POSITION = 9  # of the tokens that are chosen
PADDING = 1e9
LOGITS = Path(__file__).parent / "data" / "smollm2_logits.npy"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(comm: Communicator, logits_RV: Tensor) -> tuple[CutVocabulary, Tensor]:
    """A rank's columns, as an output head leaves them."""
    vocab_size = logits_RV.shape[1]
    shard = Sharding.over(comm).padded(0)
    first, stop = shard.bounds(vocab_size)
    part_RL = logits_RV.new_full((logits_RV.shape[0], shard.local_size(vocab_size)), PADDING)
    part_RL[:, : stop - first] = logits_RV[:, first:stop]
    return CutVocabulary(comm, vocab_size, first_id=first, num_tokens=stop - first), part_RL


def on_ranks(
    num_ranks: int, logits_RV: Tensor, work: Callable[[CutVocabulary, Tensor], Tensor]
) -> Tensor:
    """What `work` gives on every rank, which is the same."""

    def of_rank(comms: Comms) -> Tensor:
        return work(*cut(comms.axes["tp"], logits_RV))

    first, *others = run_ranks(tp_comms(num_ranks), of_rank)
    assert all(torch.equal(first, other) for other in others)
    return first


def every_request() -> list[SamplingParams]:
    """All combinations of what may be asked, and some extremes."""
    each = {
        "temperature": (0.0, 0.7, 1.5),
        "top_k": (0, 1, 5, 40),
        "top_p": (1.0, 0.9, 0.3),
        "min_p": (0.0, 0.1),
        "repetition_penalty": (1.0, 1.3),
        "frequency_penalty": (0.0, 0.4),
        "logit_bias": ({}, {0: -math.inf, 7: 2.0, 250: 4.5, 4: -100.0, 10**6: 9.0}),
        "min_tokens": (0, 90),
    }
    requests = [
        dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())
    ]
    requests += [
        {"top_p": 0.0},
        {"top_p": 1e-9, "top_k": 7},
        {"top_p": 1 - 1e-15},
        {"top_p": 0.5, "temperature": 100.0},
        {"top_p": 0.99, "temperature": 0.01},
        {"top_k": 10**9},
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "top_p": 0.8},
    ]
    return [
        SamplingParams(**{"max_tokens": 100, "stop_token_ids": [2, 11]} | fields)
        for fields in requests
    ]


def sampler_of(requests: Sequence[SamplingParams], vocab_size: int) -> tuple[Sampler, Tensor]:
    """A sampler with a request in each slot, and the tokens of the slots."""
    sampler = Sampler(max_slots=len(requests), vocab_size=vocab_size, device=CPU, eos_ids=[EOS])
    tokens_SL = torch.randint(vocab_size, (len(requests), 32), generator=generator(1)).int()
    sampler.init_slots(
        [
            SlotInit(slot, [0] * PROMPT, PROMPT, params, 1000 + slot)
            for slot, params in enumerate(requests)
        ]
    )
    return sampler, tokens_SL


def sampled(
    requests: Sequence[SamplingParams], logits_RV: Tensor, num_ranks: int
) -> tuple[list[int], list[int]]:
    """Tokens of one rank, and of several."""
    sampler, tokens_SL = sampler_of(requests, logits_RV.shape[1])
    slots, positions = list(range(len(requests))), [POSITION] * len(requests)
    alone = sampler.sample(sampler.prepare(slots, positions), logits_RV, tokens_SL)

    def together(over: CutVocabulary, part_RL: Tensor) -> Tensor:
        before = part_RL.clone()
        plan = sampler.prepare(slots, positions, over)
        chosen_R = sampler.sample(plan, part_RL, tokens_SL)
        assert torch.equal(part_RL.view(torch.int32), before.view(torch.int32))
        return chosen_R

    return alone.tolist(), on_ranks(num_ranks, logits_RV, together).tolist()


def tied(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Logits of which many are equal, and some impossible."""
    gen = generator(seed)
    logits_RV = (torch.randn(num_rows, vocab_size, generator=gen) * 8).round() / 4
    logits_RV[torch.rand(num_rows, vocab_size, generator=gen) < 0.05] = -math.inf
    return logits_RV


@pytest.fixture
def few_are_listed(monkeypatch):
    """A top_k of 40 is a large one."""
    monkeypatch.setitem(sampler_module.LONGEST_TOP_K, "cpu", 16)


@pytest.mark.usefixtures("few_are_listed")
class TestTokens:
    @pytest.mark.parametrize("num_ranks", [2, 4])
    def test_every_combination(self, num_ranks):
        requests = every_request()
        alone, together = sampled(requests, tied(len(requests), 300), num_ranks)
        assert together == alone
        assert len(set(alone)) > 100

    @pytest.mark.parametrize(
        ("vocab_size", "num_ranks"), [(5, 2), (5, 4), (9, 7), (130, 3), (1, 2)]
    )
    def test_ranks_with_few_tokens_or_none(self, vocab_size, num_ranks):
        requests = every_request()[::3]
        alone, together = sampled(requests, tied(len(requests), vocab_size, seed=2), num_ranks)
        assert together == alone

    @pytest.mark.parametrize("vocab_size", [10, 200])
    @pytest.mark.parametrize("kind", ["temperature", "top_k", "top_p", "penalties"])
    def test_requests_of_one_kind(self, kind, vocab_size):
        """Steps of one kind take other branches than mixed ones."""
        fields = {
            "temperature": {"temperature": 0.9},
            "top_k": {"top_k": 9},
            "top_p": {"top_p": 0.8},
            "penalties": {"temperature": 0.0, "repetition_penalty": 1.4},
        }[kind]
        requests = [SamplingParams(max_tokens=9, **fields)] * 50
        alone, together = sampled(requests, tied(50, vocab_size, seed=3), 3)
        assert together == alone

    def test_chunks_of_rows(self, monkeypatch):
        requests = every_request()[::7]
        logits_RV = tied(len(requests), 301, seed=4)
        alone, _ = sampled(requests, logits_RV, 2)
        monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", 1500)
        assert sampled(requests, logits_RV, 2) == (alone, alone)

    @pytest.mark.parametrize("num_ranks", [2, 4])
    def test_a_real_vocabulary(self, num_ranks):
        """Real logits with some noise; weights of tens of thousands of tokens."""
        requests = every_request()[::53] + every_request()[-8:]
        real_V = torch.from_numpy(np.load(LOGITS))
        noise_RV = torch.randn(len(requests), len(real_V), generator=generator(5))
        alone, together = sampled(requests, real_V + noise_RV, num_ranks)
        assert together == alone

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("everywhere", [False, True])
    def test_a_broken_row_leaves_the_others(self, value, everywhere):
        requests = every_request()[::5]
        logits_RV = tied(len(requests), 100, seed=6)
        broken = range(0, len(requests), 4)
        for row in broken:
            logits_RV[row, slice(None) if everywhere else 77] = value
        alone, together = sampled(requests, logits_RV, 2)
        assert all(0 <= token < 100 for token in together)
        for row, pair in enumerate(zip(together, alone, strict=True)):
            assert row in broken or pair[0] == pair[1]


def ratios(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    """Probabilities over the best token's."""
    gen = generator(7)
    if kind == "equal":
        return torch.ones(num_rows, vocab_size)
    spread = {"flat": 0.01, "usual": 3.0, "peaked": 60.0}[kind]
    logits_RV = torch.randn(num_rows, vocab_size, generator=gen) * spread
    return relative_probabilities(logits_RV, logits_RV.amax(1), torch.ones(num_rows))


@pytest.mark.parametrize("kind", ["equal", "flat", "usual", "peaked"])
@pytest.mark.parametrize("asked", ["top_k", "top_p", "both"])
def test_thresholds_are_found_to_the_last_bit(kind, asked):
    """Every top_k, and top_p over its range."""
    vocab_size = 120
    ratio_RV = ratios(kind, vocab_size, vocab_size)
    top_k_F = torch.arange(1, vocab_size + 1) if asked != "top_p" else None
    top_p_F = torch.linspace(0, 1, vocab_size, dtype=torch.float64) if asked != "top_k" else None
    filtered = Filter(None, vocab_size, top_k_F, top_p_F, torch.zeros(vocab_size))
    expected_F = filter_thresholds(ratio_RV, filtered)
    found_F = on_ranks(
        3,
        ratio_RV,
        lambda over, part_RL: over.filter_thresholds(over.tokens_of(part_RL), filtered),
    )
    # Whatever has no weight may stay or go: a row's threshold may lie anywhere below.
    least = 1 / sampling.WEIGHT_SCALE
    assert torch.equal(found_F.clamp(min=least), expected_F.clamp(min=least))


def test_enough_edges_for_all_ratios():
    assert torch.tensor(1.0).view(torch.int32) < EDGES**ROUNDS


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_end_points_of_the_distribution(num_ranks):
    """u = 0 takes the first token with weight, u just below 1 the last one, on whichever rank."""
    ratio_RV = torch.tensor([[0.0, 0.0, 0.25, 1.0, 0.0, 0.5, 0.0], [1.0, *[0.0] * 6]])
    ratio_RV = ratio_RV.repeat_interleave(2, 0)
    uniform_R = torch.tensor([0.0, 1 - 2**-53] * 2, dtype=torch.float64)
    drawn_R = on_ranks(
        num_ranks,
        ratio_RV,
        lambda over, part_RL: over.draw_tokens(
            over.tokens_of(part_RL), None, uniform_R, torch.full((4,), 6)
        ),
    )
    assert drawn_R.tolist() == [2, 5, 0, 0]


class TestLogprobs:
    def entries(self, logits_RV, chosen, num_top, num_ranks):
        def of_rank(comms):
            over, part_RL = cut(comms.axes["tp"], logits_RV)
            return sampled_logprobs(part_RL, torch.tensor(chosen), num_top, over).to_host()

        first, *others = run_ranks(tp_comms(num_ranks), of_rank)
        assert all(str(first) == str(other) for other in others)  # NaN is not equal to itself
        return first

    @pytest.mark.parametrize("num_ranks", [2, 4, 7])
    @pytest.mark.parametrize("chunk_logits", [300, 1 << 20])
    def test_agree_with_one_rank(self, monkeypatch, num_ranks, chunk_logits):
        """Float32 sums of parts are added up, which changes last bits."""
        logits_RV = torch.randn(9, 150, generator=generator(8)) * 4
        chosen, num_top = [3, 149, 0, 17, 75, 8, 8, 74, 1], [None, 0, 20, 5, 1, 0, 150, 160, None]
        expected = sampled_logprobs(logits_RV, torch.tensor(chosen), num_top).to_host()
        monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", chunk_logits)
        found = self.entries(logits_RV, chosen, num_top, num_ranks)
        for mine, other in zip(found, expected, strict=True):
            assert (mine.token_id, mine.rank, mine.top_ids) == (
                other.token_id,
                other.rank,
                other.top_ids,
            )
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)

    def test_ties_and_impossible_tokens(self):
        logits_RV = torch.tensor([[1.0, 2.0, -math.inf, 2.0, 0.0, 2.0]])
        for token, rank in [(0, 4), (1, 1), (5, 1), (4, 5), (2, 6)]:
            (entry,) = self.entries(logits_RV, [token], [4], 3)
            assert entry.rank == rank
            assert entry.top_ids == [1, 3, 5, 0]
        assert entry.logprob == -math.inf

    def test_nan_leaves_the_other_rows(self):
        logits_RV = torch.randn(3, 40, generator=generator(9))
        expected = self.entries(logits_RV, [1, 2, 3], [2] * 3, 2)
        logits_RV[1, 30] = math.nan
        found = self.entries(logits_RV, [1, 2, 3], [2] * 3, 2)
        assert [found[0], found[2]] == [expected[0], expected[2]]
        assert math.isnan(found[1].logprob)


class Counting:
    """A communicator that counts what a rank brings into all_gather; others are not called."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.num_bytes = self.num_calls = 0

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.num_bytes += x.nbytes
        self.num_calls += 1
        return self._comm.all_gather(x, dim)


@pytest.mark.parametrize(
    ("fields", "num_calls", "most_bytes"),
    [
        ({"temperature": 0.0, "repetition_penalty": 1.2}, 1, 8),
        ({"min_p": 0.1}, 3, 24),
        ({"top_k": 20}, 4, 104),
        ({"top_k": 20, "top_p": 0.9}, 5, 112),
        ({"top_p": 0.9}, 7, 5848),
        ({"top_k": 5000, "top_p": 0.9}, 11, 11672),
    ],
    ids=str,
)
def test_what_travels(fields, num_calls, most_bytes):
    """Bytes of a row that each rank sends to each other one. Of logits it would be 100,000."""
    vocab_size, num_rows = 50_000, 3
    requests = [SamplingParams(max_tokens=9, **fields)] * num_rows
    sampler, tokens_SL = sampler_of(requests, vocab_size)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator(10))

    def of_rank(comms: Comms) -> tuple[int, int]:
        counting = Counting(comms.axes["tp"])
        over, part_RL = cut(counting, logits_RV)
        slots = list(range(num_rows))
        sampler.sample(sampler.prepare(slots, [POSITION] * num_rows, over), part_RL, tokens_SL)
        return counting.num_calls, counting.num_bytes

    for found in run_ranks(tp_comms(2), of_rank):
        assert found == (num_calls, most_bytes * num_rows)


def test_one_rank_has_every_column():
    over = WholeVocabulary(5)
    logits_RV = tied(2, 5)
    assert over.copy(logits_RV).data_ptr() != logits_RV.data_ptr()
    assert over.tokens_of(logits_RV) is logits_RV


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_without_its_peers_chooses_some_token(rank):
    """Where the others are taken to bring the same, nobody may have what is drawn."""
    requests = every_request()[::9]
    sampler, tokens_SL = sampler_of(requests, 100)
    over, part_RL = cut(EmulatedCommunicator(rank, 4), tied(len(requests), 100, seed=11))
    plan = sampler.prepare(list(range(len(requests))), [POSITION] * len(requests), over)
    chosen_R = sampler.sample(plan, part_RL, tokens_SL)
    assert ((chosen_R >= 0) & (chosen_R < 100)).all()
