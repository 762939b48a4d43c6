"""Staging kernels against the oracle, in Triton's interpreter or compiled on a GPU."""

import os

import pytest
import torch

from core.ops.stage import (
    HEADER,
    DecodeRows,
    PromptRows,
    TorchStaging,
    packed_length,
    packed_prompts_length,
)

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def staging():
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton's interpreter is off")
    from core.devices.cuda.triton_stage import TritonStaging

    return TritonStaging()


def buffers(size, num_columns):
    def filled(shape, dtype):
        return torch.full(shape, 77, dtype=dtype, device=DEVICE)

    return DecodeRows(
        filled((packed_length(size),), torch.int32),
        filled((size,), torch.int64),
        filled((size,), torch.int64),
        filled((size,), torch.int64),
        filled((size,), torch.int32),
        filled((size, num_columns), torch.int32),
    )


def random_step(generator, size, num_real, num_slots, page_size, num_columns):
    """Tokens, pages and a packed step whose new entries are pages of its rows."""

    def ints(most, shape):
        return torch.randint(most, shape, generator=generator, dtype=torch.int32)

    max_tokens = num_columns * page_size
    tokens_ZL = ints(1000, (num_slots, max_tokens + 1))
    pages_ZM = ints(5000, (num_slots, num_columns))
    packed = ints(10**6, (packed_length(size),))
    slots_R = torch.randperm(num_slots, generator=generator)[:num_real].to(torch.int32)
    positions_R = ints(max_tokens, (num_real,))
    new = torch.rand(num_real, generator=generator) < 0.5
    packed[0], packed[1] = num_real, int(new.sum())
    for field, values in enumerate(
        (
            slots_R,
            positions_R,
            slots_R[new],
            positions_R[new] // page_size,
            ints(5000, (int(new.sum()),)),
        )
    ):
        start = HEADER + field * size
        packed[start : start + len(values)] = values
    return packed.to(DEVICE), tokens_ZL.to(DEVICE), pages_ZM.to(DEVICE)


@pytest.mark.parametrize(
    ("size", "num_real", "page_size", "num_columns"),
    [(1, 1, 16, 3), (1, 0, 16, 3), (4, 3, 1, 40), (8, 8, 4, 5), (150, 131, 16, 7), (2, 2, 2, 600)],
)
def test_rows_are_staged_as_the_oracle_does(staging, size, num_real, page_size, num_columns):
    generator = torch.Generator().manual_seed(size + num_real)
    num_slots = size + 3
    packed, tokens_ZL, pages_ZM = random_step(
        generator, size, num_real, num_slots, page_size, num_columns
    )
    found, expected = buffers(size, num_columns), buffers(size, num_columns)
    pages_too_ZM = pages_ZM.clone()
    for rows in (found, expected):
        rows.packed.copy_(packed)
    TorchStaging().stage(expected, tokens_ZL, pages_too_ZM, page_size)
    staging.stage(found, tokens_ZL, pages_ZM, page_size)
    assert torch.equal(pages_ZM, pages_too_ZM)
    for name in ("input_ids_S", "positions_S", "kv_slots_S", "context_lens_S", "page_table_SM"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert int(found.num_real) == num_real

    ids_S = torch.randint(1000, (size,), generator=generator).to(DEVICE)
    tokens_too_ZL = tokens_ZL.clone()
    TorchStaging().store(ids_S, expected.places, tokens_too_ZL)
    staging.store(ids_S, found.places, tokens_ZL)
    assert torch.equal(tokens_ZL, tokens_too_ZL)


def test_staging_of_one_step_by_hand(staging):
    rows = buffers(2, 3)
    rows.packed.copy_(torch.tensor([1, 1, 5, 0, 9, 0, 5, 0, 2, 0, 8, 0], dtype=torch.int32))
    tokens_ZL = torch.arange(6 * 13, dtype=torch.int32, device=DEVICE).view(6, 13)
    pages_ZM = torch.zeros((6, 3), dtype=torch.int32, device=DEVICE)
    staging.stage(rows, tokens_ZL, pages_ZM, 4)
    assert pages_ZM[5].tolist() == [0, 0, 8]
    assert rows.input_ids_S.tolist() == [5 * 13 + 9, 0]
    assert rows.positions_S.tolist() == [9, 0]
    assert rows.kv_slots_S.tolist() == [8 * 4 + 1, -1]
    assert rows.context_lens_S.tolist() == [10, 0]
    assert rows.page_table_SM[0].tolist() == [0, 0, 8]
    staging.store(torch.tensor([3, 4], device=DEVICE), rows.places, tokens_ZL)
    assert tokens_ZL[5, 10] == 3
    assert tokens_ZL[0, 0] == 0


@pytest.mark.parametrize(
    ("lengths", "before", "num_rows", "size", "page_size"),
    [
        ([5], [0], 8, 1, 4),
        ([], [], 4, 3, 4),
        ([1, 40, 1, 7], [30, 0, 0, 9], 200, 4, 16),
        ([1] * 9 + [130], [7] * 10, 139, 32, 1),
        ([300], [700], 300, 2, 2),
    ],
)
def test_prompts_are_staged_as_the_oracle_does(staging, lengths, before, num_rows, size, page_size):
    generator = torch.Generator().manual_seed(len(lengths))
    num_slots, num_columns = size + 2, 1000 // page_size + 1
    tokens_ZL = torch.randint(
        1000, (num_slots, num_columns * page_size + 1), generator=generator, dtype=torch.int32
    ).to(DEVICE)
    pages_ZM = torch.randint(
        5000, (num_slots, num_columns), generator=generator, dtype=torch.int32
    ).to(DEVICE)
    count, total = len(lengths), sum(lengths)
    packed = torch.zeros(packed_prompts_length(size), dtype=torch.int32)
    packed[0], packed[1] = total, count
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed[HEADER : HEADER + size + 1] = total
    packed[HEADER : HEADER + count + 1] = ends
    lists = packed[HEADER + size + 1 :].view(3, size)
    lists[0, :count] = torch.randperm(num_slots, generator=generator)[:count]
    lists[1, :count] = torch.tensor(lengths) + torch.tensor(before)
    lists[2, :count] = torch.where(torch.arange(count) % 3 == 1, -1, lists[1, :count])

    def made():
        return PromptRows(
            packed.to(DEVICE),
            *(torch.full((num_rows,), 77, device=DEVICE) for _ in range(3)),
            torch.full((size,), 77, device=DEVICE),
            torch.full((size, num_columns), 77, dtype=torch.int32, device=DEVICE),
        )

    found, expected = made(), made()
    TorchStaging().stage_prompts(expected, tokens_ZL, pages_ZM, page_size)
    staging.stage_prompts(found, tokens_ZL, pages_ZM, page_size)
    for name in ("input_ids_T", "positions_T", "kv_slots_T", "last_S", "page_table_SM"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    ids_S = torch.arange(size, device=DEVICE) + 5
    tokens_too_ZL = tokens_ZL.clone()
    TorchStaging().store(ids_S, expected.places, tokens_too_ZL)
    staging.store(ids_S, found.places, tokens_ZL)
    assert torch.equal(tokens_ZL, tokens_too_ZL)
    assert int((tokens_ZL[:, 0] != tokens_too_ZL[:, 0]).sum()) == 0


def best(found_by, logits_SV, num_ranks=1):
    """As ranks find it that share the columns out, the last one with fewer tokens."""
    vocab_size = logits_SV.shape[1]
    width = -(-vocab_size // num_ranks)
    padded_SV = torch.nn.functional.pad(logits_SV, (0, width * num_ranks - vocab_size), value=99.0)
    if num_ranks == 1:
        padded_SV = logits_SV  # as it lies
    parts = [
        found_by.best_parts(columns, rank * width, min(width, vocab_size - rank * width))
        for rank, columns in enumerate(padded_SV.split(width, dim=1))
    ]
    assert all(part.dtype == torch.int32 for part in parts)
    return found_by.best_of_parts(torch.stack(parts))


@pytest.mark.parametrize("size", [1, 3, 17])
@pytest.mark.parametrize("vocab_size", [5, 4096, 4097, 13000])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_first_best_token_of_every_row(staging, size, vocab_size, num_ranks):
    generator = torch.Generator().manual_seed(vocab_size)
    wide_SV = torch.randn((size, vocab_size + 3), generator=generator).to(DEVICE)
    logits_SV = wide_SV[:, :vocab_size]  # a part of wider rows, as a cut head gives it
    assert best(staging, logits_SV, num_ranks).tolist() == logits_SV.argmax(1).tolist()
    assert best(TorchStaging(), logits_SV, num_ranks).tolist() == logits_SV.argmax(1).tolist()
    tied_SV = (logits_SV * 2).round()
    first = [int((row == row.max()).nonzero()[0]) for row in tied_SV]
    assert best(staging, tied_SV, num_ranks).tolist() == first
    assert best(TorchStaging(), tied_SV, num_ranks).tolist() == first


def test_rows_of_nan_give_a_token_all_the_same(staging):
    logits_SV = torch.full((3, 5000), float("nan"), device=DEVICE)
    logits_SV[1] = -float("inf")
    logits_SV[2, 4999] = 1.0
    for num_ranks in (1, 4):
        assert best(staging, logits_SV, num_ranks).tolist() == [0, 0, 4999]
        assert best(TorchStaging(), logits_SV, num_ranks).tolist() == [0, 0, 4999]
