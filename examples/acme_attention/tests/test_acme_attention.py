"""The backend against Nodeweave's contract of its family."""

from functools import partial

import pytest
from acme_attention import AcmeOptions
from acme_attention.backend import AcmeAttention

from core.testing.attention import CASES, Case, check_backend


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_float64_attention(case: Case) -> None:
    check_backend(partial(AcmeAttention, AcmeOptions(query_block=64)), case)
