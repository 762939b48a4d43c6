"""The shipped contract of balancers holds for ours, and finds what is wrong with one."""

import pytest

from core.plugin.hookspecs import NoOptions, Registration
from core.testing.balancer import CASES, Case, check_balancer
from plugins.balancers import register_balancer
from plugins.balancers.least_tokens import LeastTokens

OURS = {registration.name: registration for registration in register_balancer()}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_keep_it(name: str, case: Case) -> None:
    check_balancer(OURS[name], case)


class Leaks(LeastTokens):
    def __init__(self, options, spec):
        super().__init__(options, spec)
        self.seen = {}

    def remove(self, request_id, *, finished):
        super().remove(request_id, finished=finished)
        self.seen[request_id] = finished


class LeaksAborted(LeastTokens):
    def remove(self, request_id, *, finished):
        if finished:
            super().remove(request_id, finished=finished)


class OffByOne(LeastTokens):
    def add(self, request, gauges):
        return super().add(request, gauges) + 1


class Half(LeastTokens):
    def add(self, request, gauges):
        return super().add(request, gauges) / 1


class First(LeastTokens):
    def add(self, request, gauges):
        return self.assign(0, request, 1)


class Counts(LeastTokens):
    def add(self, request, gauges):
        rank = super().add(request, gauges)
        gauges[rank].num_waiting += 1
        return rank


class NeedsProgress(LeastTokens):
    def __init__(self, options, spec):
        super().__init__(options, spec)
        self.begun = set()

    def progress(self, request_id, num_tokens):
        super().progress(request_id, num_tokens)
        self.begun.add(request_id)

    def remove(self, request_id, *, finished):
        super().remove(request_id, finished=finished)
        self.begun.remove(request_id)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Leaks, "bytes are kept of each request"),
        (LeaksAborted, "again|bytes are kept"),
        (OffByOne, "there are the ranks 0 to"),
        (Half, "returned a float"),
        (First, "none on the ranks"),
        (Counts, "changed the gauges"),
        (NeedsProgress, "request-"),
    ],
)
def test_what_is_wrong_is_found(broken: type, says: str) -> None:
    registration = Registration(name="broken", factory=broken, config=NoOptions)
    found = []
    for case in CASES:
        try:
            check_balancer(registration, case)
        except (AssertionError, KeyError) as error:
            found.append(str(error))
    assert found
    with pytest.raises(AssertionError, match=says):
        raise AssertionError("\n".join(found))
