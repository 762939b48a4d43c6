"""The backend against Nodeweave's contract of its family, in small parts and in large ones."""

from functools import partial

import pytest
import torch
from acme_latent import AcmeOptions
from acme_latent.backend import AcmeLatent

from core.testing.latent_attention import (
    CASES,
    SMALL,
    TOLERANCE,
    Case,
    check_backend,
    check_parts,
    make_step,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_float64_attention(case: Case) -> None:
    check_backend(partial(AcmeLatent, AcmeOptions(part_tokens=100)), case)


@pytest.mark.parametrize("part_tokens", [1, 7, 64])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_few_tokens_are_expanded_at_a_time(case: Case, part_tokens: int) -> None:
    step = make_step(case, torch.float32, torch.device("cpu"))
    make = partial(AcmeLatent, AcmeOptions(part_tokens=part_tokens))
    check_parts(make, step, TOLERANCE[torch.float32], most_tokens=part_tokens)
