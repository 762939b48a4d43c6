"""What the sampler draws: distributions, greedy rows, penalties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.interfaces.messages import SamplingParams
from tests.support.sampler_pool import EOS, MIXED, Pool, params


def processed(logits_V, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities by transformers' processors, in its order."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    ids = torch.zeros((1, 1), dtype=torch.int64)
    return processors(ids, logits_V[None].clone())[0].double().softmax(-1)


def draw_counts(logits_V, sampling: SamplingParams) -> np.ndarray:
    """10,000 draws from one row, counted: each row a seed of its own, each step a position."""
    num_rows = 100
    pool = Pool(len(logits_V))
    for slot in range(num_rows):
        pool.add(slot, sampling, seed=1000 + slot)
    slots, logits_RV = list(range(num_rows)), logits_V.expand(num_rows, -1)
    drawn = [pool.sample(logits_RV, slots, [step + 1] * num_rows) for step in range(100)]
    return torch.cat(drawn).bincount(minlength=len(logits_V)).numpy()


def p_value(observed_V: np.ndarray, probs_V: torch.Tensor) -> float:
    """Chi-square, tokens expected less than five times merged; 0 for tokens not allowed."""
    expected_V = probs_V.numpy() * observed_V.sum()
    if observed_V[expected_V == 0].any():
        return 0.0
    order = np.argsort(-expected_V)
    observed_V, expected_V = observed_V[order], expected_V[order]
    frequent = int((expected_V >= 5).sum())
    if expected_V[frequent:].sum() < 5:
        frequent -= 1  # the last bin takes the rest
    observed = [*observed_V[:frequent], observed_V[frequent:].sum()]
    expected = [*expected_V[:frequent], expected_V[frequent:].sum()]
    assert len(expected) > 3
    return float(stats.chisquare(observed, expected).pvalue)


def likely(logits_V: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The best tokens of a row, in their order: drawn from in a tenth of the time."""
    return logits_V[logits_V.topk(num_tokens).indices.sort().values]


class TestDistribution:
    @pytest.mark.parametrize(
        "num_tokens", [4096, pytest.param(49152, marks=pytest.mark.slow)], ids=["likely", "whole"]
    )
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"temperature": 0.5},
            {"top_k": 40},
            {"top_k": 2000, "temperature": 0.8},
            {"top_p": 0.9},
            {"min_p": 0.02},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
            {"temperature": 1.2, "top_p": 0.95, "min_p": 0.02},
            {"temperature": 1.4, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
        ],
        ids=str,
    )
    def test_matches_transformers(self, real_V, fields, num_tokens):
        sampling, logits_V = params(**fields), likely(real_V, num_tokens)
        assert p_value(draw_counts(logits_V, sampling), processed(logits_V, sampling)) > 1e-3

    def test_the_check_tells_wrong_parameters(self, real_V):
        logits_V = likely(real_V, 4096)
        counts = draw_counts(logits_V, params(min_p=0.01))
        assert p_value(counts, processed(logits_V, params(min_p=0.01))) > 1e-3
        assert p_value(counts, processed(logits_V, params(min_p=0.01, temperature=1.1))) < 1e-3
        assert p_value(counts, processed(logits_V, params(min_p=0.015))) == 0
        assert p_value(counts, processed(logits_V, params(min_p=0.008))) < 1e-3

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        temperature=st.floats(0.05, 3),
        top_k=st.integers(0, 60),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        spread=st.floats(0, 10),
        seed=st.integers(0, 2**64 - 1),
    )
    def test_chosen_tokens_are_always_allowed(self, temperature, top_k, top_p, min_p, spread, seed):
        """Checked by definition, in float64, with a margin for float32 at the edges."""
        vocab_size = 50
        gen = torch.Generator().manual_seed(seed % 2**63)
        logits_V = torch.randn(vocab_size, generator=gen) * spread
        logits_V[torch.rand(vocab_size, generator=gen) < 0.2] = -math.inf
        logits_V[7] = 0.0
        sampling = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        token = Pool(vocab_size).one(logits_V, sampling, seed=seed)
        probs_V = (logits_V.double() / temperature).softmax(-1)
        mine = float(probs_V[token])
        assert mine > 0
        assert mine >= min_p * float(probs_V.max()) * (1 - 1e-4)
        left_V = probs_V
        if 0 < top_k < vocab_size:
            kth = float(probs_V.sort(descending=True).values[top_k - 1]) * (1 - 1e-4)
            assert mine >= kth
            left_V = torch.where(probs_V >= kth, probs_V, 0)
        more_likely = float(left_V[left_V > mine * (1 + 1e-4)].sum() / left_V.sum())
        assert more_likely < top_p + 1e-4 or more_likely == 0


class TestGreedy:
    def test_takes_the_first_best_token(self, real_V):
        assert Pool(len(real_V)).one(real_V, params(temperature=0.0)) == int(real_V.argmax())
        ties_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
        assert Pool(4).one(ties_V, params(temperature=0.0)) == 1

    def test_a_tiny_temperature_is_greedy(self, real_V):
        for temperature in (1e-9, 1e-6):
            assert Pool(len(real_V)).one(real_V, params(temperature=temperature)) == int(
                real_V.argmax()
            )

    def test_a_small_temperature_overflows_nothing(self, real_V):
        sampling = params(temperature=1e-5, top_p=0.9)
        assert Pool(len(real_V)).one(real_V * 100, sampling) == int(real_V.argmax())

    def test_greedy_batches_stage_nothing(self):
        pool = Pool(50)
        for slot in range(4):
            pool.add(slot, params(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1))
        plan = pool.sampler.prepare([0, 1, 2, 3], [1, 1, 1, 1])
        assert plan == type(plan)(num_rows=4, over=pool.sampler.whole)

    def test_no_rows(self):
        assert Pool(50).sample(torch.empty(0, 50), [], []).tolist() == []


class TestEdits:
    def test_logit_bias(self):
        logits_V = torch.tensor([0.0, 1.0, 2.0, 3.0])
        pool = Pool(4)
        assert pool.one(logits_V, params(temperature=0.0, logit_bias={1: 2.5})) == 1
        assert pool.one(logits_V, params(temperature=0.0, logit_bias={3: -100.0})) == 2
        assert pool.one(logits_V, params(logit_bias={0: 100.0})) == 0
        banned = params(temperature=5.0, logit_bias={0: -math.inf, 3: -math.inf})
        assert {pool.one(logits_V, banned, seed=seed) for seed in range(50)} == {1, 2}

    def test_bias_of_ids_outside_the_vocabulary_is_ignored(self):
        logits_V = torch.tensor([0.0, 1.0, 2.0, 3.0])
        sampling = params(
            temperature=0.0, logit_bias={4: 100.0, -1: 100.0}, stop_token_ids=[9], min_tokens=2
        )
        assert Pool(4).one(logits_V, sampling) == 2  # 3 is the eos id

    def test_bias_of_one_row_leaves_the_others(self):
        pool = Pool(4)
        logits_RV = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
        for slot, bias in enumerate([{}, {0: 9.0, 1: 10.0}, {}]):
            pool.add(slot, params(temperature=0.0, logit_bias=bias))
        assert pool.sample(logits_RV, [0, 1, 2], [1, 1, 1]).tolist() == [3, 1, 3]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("ignore_eos", [False, True])
    def test_min_tokens_forbids_eos_and_stop_tokens(self, temperature, ignore_eos):
        """Prompt of 2; the third generated token is the first that may be an end."""
        logits_V = torch.tensor([0.0, 40.0, 10.0, 80.0, 60.0])  # 3 is eos, 4 and 1 are stops
        sampling = params(
            temperature=temperature, min_tokens=2, stop_token_ids=[4, 1], ignore_eos=ignore_eos
        )
        pool = Pool(5)
        pool.add(0, sampling, tokens=[0, 0])
        chosen = [int(pool.sample(logits_V[None], [0], [2 + done])) for done in range(4)]
        assert chosen == [2, 2, 3, 3]

    def test_ignore_eos_leaves_eos_to_be_chosen(self):
        logits_V = torch.tensor([0.0, 0.0, 0.0, 9.0])
        assert Pool(4).one(logits_V, params(temperature=0.0, ignore_eos=True)) == EOS

    def test_penalties_come_from_the_slots_tokens(self, real_V):
        """Over the real row: repetition by transformers, the others by their formula."""
        best = real_V.topk(6).indices.tolist()
        prompt, generated = [best[0], best[3]], [best[1], best[1], best[2]]
        sampling = params(
            temperature=0.0,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.4,
        )
        ids = torch.tensor([prompt + generated])
        expected_V = RepetitionPenaltyLogitsProcessor(1.2)(ids, real_V[None].clone())[0]
        for token in set(generated):
            expected_V[token] -= 0.3 + 0.4 * generated.count(token)
        pool = Pool(len(real_V))
        token = pool.one(real_V, sampling, tokens=prompt + generated, num_prompt=2)
        assert token == int(expected_V.argmax())
        assert token != best[0]

    def test_order_bias_then_mask_then_penalties(self):
        """Bias makes a logit positive, so repetition divides it; a bias can't undo the mask."""
        logits_V = torch.tensor([-1.0, 4.0, 0.0, 0.0])
        sampling = params(
            temperature=0.0, repetition_penalty=2.0, logit_bias={0: 11.0, 3: 100.0}, min_tokens=1
        )
        assert Pool(4).one(logits_V, sampling, tokens=[0]) == 0  # (11 - 1) / 2 = 5 > 4
        weaker = params(
            temperature=0.0, repetition_penalty=2.0, logit_bias={0: 8.0, 3: 100.0}, min_tokens=1
        )
        assert Pool(4).one(logits_V, weaker, tokens=[0]) == 1  # (8 - 1) / 2 = 3.5 < 4

    def test_logits_are_left_as_they_were(self, real_V):
        pool = Pool(len(real_V))
        for slot, fields in enumerate(MIXED):
            pool.add(slot, params(**fields), tokens=[1, 2, 3], num_prompt=1)
        logits_RV = real_V.repeat(len(MIXED), 1)
        pool.sample(logits_RV, list(range(len(MIXED))), [3] * len(MIXED))
        assert (logits_RV == real_V).all()
