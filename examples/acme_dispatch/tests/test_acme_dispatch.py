"""The dispatcher against Nodeweave's contract of its family: every case, over 1, 2 and 4 ranks."""

from functools import partial

import pytest
from acme_dispatch.dispatcher import AcmeDispatcher

from core.plugin.hookspecs import NoOptions
from core.testing.moe_a2a import CASES, Case, check_dispatcher


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_then_combine_is_dense_moe(case: Case, ep: int) -> None:
    check_dispatcher(partial(AcmeDispatcher, NoOptions()), case, ep)
