"""The sampling kernels against the plain oracle, big-integer arithmetic and transformers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import RepetitionPenaltyLogitsProcessor

from core.engine.sample import operations as sampling
from core.engine.sample.operations import (
    Filter,
    apply_penalties_,
    draw_tokens,
    filter_thresholds,
    relative_probabilities,
    sample_oracle,
    uniform_numbers,
)

# Below and above a block, not a multiple of one, and two whole blocks.
VOCABULARIES = [1, 37, 129, 256, 1000]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(
    logits_RV, uniform_R, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, num_sorted=None
):
    """The fast path for rows that share parameters."""
    num_rows, vocab_size = logits_RV.shape
    top_R, best_R = logits_RV.max(-1)
    ratio_RV = relative_probabilities(logits_RV, top_R, torch.full((num_rows,), temperature))
    filtered = Filter(
        rows_F=None,
        num_sorted=num_sorted or vocab_size,
        top_k_F=torch.full((num_rows,), top_k or vocab_size),
        top_p_F=torch.full((num_rows,), top_p, dtype=torch.float64) if top_p < 1 else None,
        min_p_F=torch.full((num_rows,), min_p),
    )
    threshold_R = filter_thresholds(ratio_RV, filtered)
    return draw_tokens(ratio_RV, threshold_R, uniform_R, best_R)


class TestUniformNumbers:
    @staticmethod
    def mix(x: int) -> int:
        mask = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    @pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 2**63, 123456789])
    @pytest.mark.parametrize("position", [0, 1, 7, 131072])
    def test_is_what_big_integers_give(self, seed, position):
        golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
        state = (self.mix((seed + golden) & mask) + position * golden) & mask
        expected = (self.mix(state) >> 11) / 2**53
        assert uniform_numbers(np.array([seed], np.uint64), np.array([position])) == [expected]
        assert 0 <= expected < 1

    @pytest.mark.parametrize("axis", ["positions of a seed", "seeds at a position", "both"])
    def test_is_uniform_and_uncorrelated(self, axis):
        count = np.arange(100_000)
        seeds, positions = {
            "positions of a seed": (count * 0 + 42, count),
            "seeds at a position": (count, count * 0 + 17),
            "both": (count, count),
        }[axis]
        numbers = uniform_numbers(seeds.astype(np.uint64), positions)
        assert numbers.dtype == np.float64
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        # Neighbours fill the unit square evenly: 100 cells.
        tenths = (numbers * 10).astype(int)
        observed = np.bincount(tenths[:-1] * 10 + tenths[1:], minlength=100)
        assert stats.chisquare(observed).pvalue > 1e-3
        assert len(np.unique(numbers)) == len(count)

    def test_low_bits_are_even_too(self):
        count = np.arange(20_000)
        bits = (uniform_numbers(count.astype(np.uint64), count) * 2**53).astype(np.int64)
        for bit in range(53):
            ones = int((bits >> bit & 1).sum())
            assert abs(ones - 10_000) < 5 * math.sqrt(5_000), bit


class TestDraw:
    def test_end_points_of_the_distribution(self):
        """u = 0 takes the first token with weight, u just below 1 the last one."""
        ratio_RV = torch.tensor([[0.0, 0.0, 0.25, 1.0, 0.0, 0.5, 0.0]]).repeat(2, 1)
        uniform_R = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        fallback_R = torch.zeros(2, dtype=torch.int64)
        assert draw_tokens(ratio_RV, None, uniform_R, fallback_R).tolist() == [2, 5]

    @pytest.mark.parametrize("vocab_size", VOCABULARIES)
    def test_never_draws_a_token_without_weight(self, vocab_size):
        gen = generator(vocab_size)
        ratio_RV = torch.rand(400, vocab_size, generator=gen)
        ratio_RV[torch.rand(400, vocab_size, generator=gen) < 0.9] = 0
        ratio_RV[:, vocab_size // 2] = 1e-3
        uniform_R = torch.rand(400, generator=gen, dtype=torch.float64)
        uniform_R[:4] = torch.tensor([0, 1 - 2**-53, 2**-53, 0.5], dtype=torch.float64)
        drawn_R = draw_tokens(ratio_RV, None, uniform_R, torch.full((400,), -1))
        assert (ratio_RV.gather(1, drawn_R[:, None]) > 0).all()

    def test_a_row_without_weight_falls_back(self):
        nan = math.nan
        ratio_RV = torch.tensor([[nan, nan, nan], [0, 0, 0], [0, 1, nan]])
        uniform_R = torch.full((3,), 0.9, dtype=torch.float64)
        fallback_R = torch.tensor([2, 1, 0])
        assert draw_tokens(ratio_RV, None, uniform_R, fallback_R).tolist() == [2, 1, 1]

    def test_every_stretch_of_u_goes_to_its_token(self):
        """An even grid of u gives each of four tokens its share exactly."""
        ratio_RV = torch.tensor([[0.5, 0.25, 1.0, 0.25]]).expand(1000, -1)
        uniform_R = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        drawn_R = draw_tokens(ratio_RV, None, uniform_R, torch.zeros(1000, dtype=torch.int64))
        assert torch.bincount(drawn_R).tolist() == [250, 125, 500, 125]


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
    {"top_p": 0.95, "min_p": 0.1, "temperature": 0.7},
]


class TestFilters:
    @pytest.mark.parametrize("params", FILTERS, ids=str)
    @pytest.mark.parametrize("vocab_size", VOCABULARIES)
    def test_agrees_with_the_oracle(self, vocab_size, params):
        gen = generator(vocab_size)
        params = {**params, "top_k": min(params.get("top_k", 0), vocab_size)}
        logits_RV = torch.randn(60, vocab_size, generator=gen) * 3
        uniform_R = torch.rand(60, generator=gen, dtype=torch.float64)
        expected_R = sample_oracle(
            logits_RV,
            uniform_R=uniform_R,
            **{"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, **params},
        )
        assert choose(logits_RV, uniform_R, **params).tolist() == expected_R.tolist()
        if params["top_k"]:
            short = choose(logits_RV, uniform_R, **params, num_sorted=params["top_k"])
            assert short.tolist() == expected_R.tolist()

    @pytest.mark.parametrize("chunk_logits", [1, 100, 700])
    def test_chunks_change_nothing(self, monkeypatch, chunk_logits):
        gen = generator(5)
        logits_RV = torch.randn(60, 100, generator=gen) * 3
        uniform_R = torch.rand(60, generator=gen, dtype=torch.float64)
        params = {"top_k": 30, "top_p": 0.9}
        whole = (
            choose(logits_RV, uniform_R, **params),
            choose(logits_RV, uniform_R, **params, num_sorted=30),
        )
        monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", chunk_logits)
        assert choose(logits_RV, uniform_R, **params).equal(whole[0])
        assert choose(logits_RV, uniform_R, **params, num_sorted=30).equal(whole[1])

    def test_tokens_that_tie_stay_together(self):
        """Both ways of finding the threshold, with ties at the k-th and at the top_p edge."""
        logits_RV = torch.tensor([4, 3, 2, 2, 2, 2, 1, 1, 0.0]).log1p().repeat(500, 1)
        uniform_R = torch.rand(500, generator=generator(1), dtype=torch.float64)
        for params in ({"top_k": 3}, {"top_k": 3, "top_p": 0.7}):
            full = choose(logits_RV, uniform_R, **params)
            short = choose(logits_RV, uniform_R, **params, num_sorted=3)
            assert full.tolist() == short.tolist()
            assert set(full.tolist()) == {0, 1, 2, 3, 4, 5}
        # Of 5+4+3*4 = 21 parts, 0.4 is 8.4: the second token reaches it, the others go.
        only_two = choose(logits_RV, uniform_R, top_k=3, top_p=0.4, num_sorted=3)
        assert set(only_two.tolist()) == {0, 1}

    @pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.75, 2), (0.76, 4), (0.49, 1)])
    def test_tokens_that_reach_top_p_exactly_are_enough(self, top_p, kept):
        """Of 1/2, 1/4, 1/8 and 1/8 nothing is rounded."""
        ratio_RV = torch.tensor([1.0, 0.5, 0.25, 0.25]).repeat(300, 1)
        uniform_R = torch.rand(300, generator=generator(1), dtype=torch.float64)
        filtered = Filter(
            rows_F=None,
            num_sorted=4,
            top_k_F=torch.tensor([4]),
            top_p_F=torch.tensor([top_p], dtype=torch.float64),
            min_p_F=torch.tensor([0.0]),
        )
        threshold_F = filter_thresholds(ratio_RV[:1], filtered)
        assert int((ratio_RV[0] >= threshold_F).sum()) == kept
        chosen_R = draw_tokens(
            ratio_RV, threshold_F.expand(300), uniform_R, torch.zeros(300, dtype=torch.int64)
        )
        assert set(chosen_R.tolist()) == set(range(kept))

    def test_weights_beyond_fixed_point_do_not_matter(self):
        """A token 10^26 times less likely has no weight, even where top_k keeps it."""
        logits_RV = torch.tensor([[0.0, -1.0, -60.0, -80.0]]).repeat(200, 1)
        uniform_R = torch.rand(200, generator=generator(2), dtype=torch.float64)
        assert set(choose(logits_RV, uniform_R, top_k=4).tolist()) == {0, 1}
        assert set(choose(logits_RV, uniform_R, top_p=0.999).tolist()) == {0, 1}


class TestPenalties:
    def setup_method(self):
        gen = generator(3)
        self.logits_PV = torch.randn(5, 50, generator=gen)
        self.tokens_PL = torch.randint(0, 50, (5, 20), generator=gen)
        self.num_tokens_P = torch.tensor([20, 7, 1, 12, 5])
        self.num_prompt_P = torch.tensor([4, 7, 1, 3, 2])

    def apply(self, repetition=None, presence=None, frequency=None):
        """The rows, backwards, inside a larger batch that must stay as it was."""
        logits_RV = torch.full((7, 50), 3.25)
        rows_P = torch.tensor([5, 4, 3, 2, 1])
        logits_RV[rows_P] = self.logits_PV
        apply_penalties_(
            logits_RV,
            rows_P,
            self.tokens_PL,
            num_tokens_P=self.num_tokens_P,
            num_prompt_P=self.num_prompt_P,
            repetition_P=repetition,
            presence_P=presence,
            frequency_P=frequency,
        )
        assert (logits_RV[[0, 6]] == 3.25).all()
        return logits_RV[rows_P]

    @pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
    def test_repetition_is_transformers(self, penalty):
        result_PV = self.apply(repetition=torch.full((5,), penalty))
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        for row, length in enumerate(self.num_tokens_P.tolist()):
            ids = self.tokens_PL[row : row + 1, :length]
            expected = processor(ids, self.logits_PV[row : row + 1].clone())[0]
            torch.testing.assert_close(result_PV[row], expected, rtol=0, atol=0)

    def test_presence_and_frequency_count_generated_tokens_only(self):
        presence = torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0])
        frequency = torch.tensor([0.1, 0.2, 0.0, -0.4, 1.5])
        expected = self.logits_PV.double().tolist()
        for row in range(5):
            generated = self.tokens_PL[
                row, self.num_prompt_P[row] : self.num_tokens_P[row]
            ].tolist()
            for token in set(generated):
                expected[row][token] -= float(presence[row])
                expected[row][token] -= generated.count(token) * float(frequency[row])
        result_PV = self.apply(presence=presence, frequency=frequency)
        torch.testing.assert_close(result_PV.double(), torch.tensor(expected).double())
        assert result_PV[1].equal(self.logits_PV[1])  # nothing generated yet

    def test_repetition_comes_before_the_others(self):
        ones = torch.ones(5)
        both = self.apply(repetition=2 * ones, presence=ones, frequency=ones)
        self.logits_PV = self.apply(repetition=2 * ones)
        torch.testing.assert_close(both, self.apply(presence=ones, frequency=ones))

    def test_stale_tokens_beyond_the_end_are_ignored(self):
        ones = torch.ones(5)
        before = self.apply(ones * 1.5, ones, ones)
        for row, length in enumerate(self.num_tokens_P.tolist()):
            self.tokens_PL[row, length:] = 10**9
        assert self.apply(ones * 1.5, ones, ones).equal(before)

    def test_chunks_change_nothing(self, monkeypatch):
        gen = generator(4)
        penalties = [torch.rand(5, generator=gen) + 0.5 for _ in range(3)]
        whole = self.apply(*penalties)
        monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", 100)
        assert self.apply(*penalties).equal(whole)

    def test_minus_infinity_stays(self):
        self.logits_PV[:] = -math.inf
        ones = torch.ones(5)
        assert (self.apply(ones * 1.5, ones, ones) == -math.inf).all()

    def test_a_token_of_prompt_and_answer_counts_once_for_repetition(self):
        self.tokens_PL[0] = 9
        ones = torch.ones(5)
        result_PV = self.apply(2 * ones, ones, ones)
        value = float(self.logits_PV[0, 9])
        expected = (value / 2 if value > 0 else value * 2) - 1 - 16
        assert result_PV[0, 9].item() == pytest.approx(expected, abs=1e-5)
