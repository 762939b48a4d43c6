"""Log-probabilities against torch.log_softmax in float64."""

import math

import pytest
import torch

from core.engine.sample import operations as sampling
from core.engine.sample.logprobs import prompt_logprobs, sampled_logprobs
from core.interfaces.messages import TokenLogprobs


def expected_entry(logits_V, token: int, num_top: int) -> TokenLogprobs:
    reference_V = torch.log_softmax(logits_V.double(), -1)
    order = reference_V.argsort(descending=True).tolist()
    top = order[:num_top]
    return TokenLogprobs(
        token, float(reference_V[token]), order.index(token) + 1, top, reference_V[top].tolist()
    )


def assert_same(entry: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (entry.token_id, entry.rank, entry.top_ids) == (
        expected.token_id,
        expected.rank,
        expected.top_ids,
    )
    assert entry.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert entry.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-5)


@pytest.fixture
def logits_RV() -> torch.Tensor:
    return torch.randn(7, 500, generator=torch.Generator().manual_seed(0)) * 4


CHOSEN = [3, 499, 0, 17, 250, 8, 8]


@pytest.mark.parametrize(
    "num_top",
    [
        [0] * 7,
        [5] * 7,
        [None, 0, 3, None, 20, 1, None],
        [None] * 6 + [2],
        [500, 1, 0, 600, 2, 3, 4],
    ],
    ids=str,
)
def test_sampled(logits_RV, num_top):
    entries = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), num_top).to_host()
    wanted = [row for row, num in enumerate(num_top) if num is not None]
    assert len(entries) == len(wanted)
    for row, entry in zip(wanted, entries, strict=True):
        assert_same(entry, expected_entry(logits_RV[row], CHOSEN[row], num_top[row]))


def test_nobody_asks(logits_RV):
    assert sampled_logprobs(logits_RV, torch.tensor(CHOSEN), [None] * 7).to_host() == []


@pytest.mark.parametrize("chunk_logits", [1, 500, 1300, 1 << 24])
@pytest.mark.parametrize("num_top", [0, 4])
def test_prompt_in_chunks(logits_RV, monkeypatch, chunk_logits, num_top):
    monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", chunk_logits)
    entries = prompt_logprobs(logits_RV, torch.tensor(CHOSEN), num_top).to_host()
    assert len(entries) == 7
    for row, entry in enumerate(entries):
        assert_same(entry, expected_entry(logits_RV[row], CHOSEN[row], num_top))


def test_sampled_rows_in_chunks(logits_RV, monkeypatch):
    monkeypatch.setitem(sampling.CHUNK_LOGITS, "cpu", 1000)
    num_top = [1, None, 2, 3, None, 0, 5]
    entries = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), num_top).to_host()
    for row, entry in zip([0, 2, 3, 5, 6], entries, strict=True):
        assert_same(entry, expected_entry(logits_RV[row], CHOSEN[row], num_top[row]))


def test_empty_prompt_part():
    empty = prompt_logprobs(torch.empty(0, 50), torch.empty(0, dtype=torch.int64), 3)
    assert empty.to_host() == []


def test_ties_share_the_better_rank():
    logits_RV = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    for token, rank in [(0, 3), (1, 1), (2, 1), (3, 4)]:
        (entry,) = sampled_logprobs(logits_RV, torch.tensor([token]), [0]).to_host()
        assert entry.rank == rank


def test_forbidden_tokens_and_extreme_logits():
    logits_RV = torch.tensor([[-math.inf, 1e4, 0.0, -1e4]])
    (entry,) = sampled_logprobs(logits_RV, torch.tensor([1]), [4]).to_host()
    assert entry.logprob == 0.0
    assert entry.top_ids == [1, 2, 3, 0]
    assert entry.top_logprobs == [0.0, -1e4, -2e4, -math.inf]


def test_a_row_with_nan_leaves_the_others(logits_RV):
    expected = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), [3] * 7).to_host()
    logits_RV[2, 9] = math.nan
    entries = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), [3] * 7).to_host()
    assert [entries[row] for row in (0, 1, 3, 6)] == [expected[row] for row in (0, 1, 3, 6)]
    assert math.isnan(entries[2].logprob)


def test_copied_to_the_host_ahead_of_time(logits_RV):
    result = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), [3] * 7)
    assert result.copy_async().to_host() == result.to_host()


def test_logits_are_left_as_they_were(logits_RV):
    before_RV = logits_RV.clone()
    sampled_logprobs(logits_RV, torch.tensor(CHOSEN), [3] * 7)
    prompt_logprobs(logits_RV, torch.tensor(CHOSEN), 2)
    assert logits_RV.equal(before_RV)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_without_waiting(logits_RV):
    on_gpu_RV, chosen_R = logits_RV.cuda(), torch.tensor(CHOSEN).cuda()
    num_top = [None, 0, 3, None, 20, 1, None]
    sampled_logprobs(on_gpu_RV, chosen_R, num_top)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sampled_logprobs(on_gpu_RV, chosen_R, num_top).copy_async()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    expected = sampled_logprobs(logits_RV, torch.tensor(CHOSEN), num_top).to_host()
    for entry, reference in zip(result.to_host(), expected, strict=True):
        assert_same(entry, reference)
