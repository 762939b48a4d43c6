"""The contract of balancers: a rank for every request, and nothing kept of those that ended.

    from core.testing.balancer import CASES, check_balancer

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(case):
        [registration] = acme_balancer.register_balancer()
        check_balancer(registration, case)

Whether it chooses well is for tests of its own, and so is its speed: a choice takes the time of the
event loop that serves all requests.
"""

import copy
import importlib
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.interfaces.balancer import Balancer, BalancerSpec, RequestView
from core.interfaces.messages import EngineStats
from core.plugin.hookspecs import Registration

BLOCK_TOKENS = 64
MOST_KEPT_BYTES = 32  # of a request that has ended


@dataclass(frozen=True, slots=True)
class Case:
    """One property, with a number of ranks."""

    check: str
    num_ranks: int

    def __str__(self) -> str:
        return f"{self.check}-{self.num_ranks}"


def check_balancer(registration: Registration, case: Case, options: Any = None) -> None:
    """Raises AssertionError, or what the balancer does. `options`: those of the registration's
    `config`; None: its defaults."""
    factory = registration.factory
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        factory = getattr(importlib.import_module(module), name)
    spec = BalancerSpec(case.num_ranks, BLOCK_TOKENS)
    made = factory(registration.config() if options is None else options, spec)
    _CHECKS[case.check](Traffic(made, case.num_ranks))


class Traffic:
    """Requests as a server would have them."""

    def __init__(self, balancer: Balancer, num_ranks: int) -> None:
        self.balancer = balancer
        self.num_ranks = num_ranks
        self.draw = random.Random(num_ranks)
        self.live: list[str] = []
        self._num_added = 0

    def add(self, request_id: str | None = None, num_prompt_tokens: int | None = None) -> int:
        """A request that begins like some other ones, or like none."""
        self._num_added += 1
        draw, request_id = self.draw, request_id or f"request-{self._num_added}"
        tokens = draw.randint(1, 600) if num_prompt_tokens is None else num_prompt_tokens
        beginning = draw.choice([1, 2, 3, 1000 + self._num_added])
        hashes = [hash((beginning, block)) for block in range(tokens // BLOCK_TOKENS)]
        view = RequestView(
            request_id,
            num_prompt_tokens=tokens,
            max_tokens=draw.choice([0, 1, 100, 100_000]),
            fills_max_tokens=draw.random() < 0.5,
            priority=draw.choice([0, 0, -5, 7]),
            prefix_hashes=lambda: hashes,
        )
        gauges = [
            EngineStats(draw.randint(0, 9), draw.randint(0, 9), 100, draw.randint(0, 100))
            for _ in range(self.num_ranks)
        ]
        before = copy.deepcopy(gauges)
        rank = self.balancer.add(view, gauges)
        assert type(rank) is int, f"add returned a {type(rank).__name__}; a rank is an int"
        last = self.num_ranks - 1
        assert 0 <= rank <= last, f"add returned {rank}; there are the ranks 0 to {last}"
        assert gauges == before, "add changed the gauges, which are to be read only"
        self.live.append(request_id)
        return rank

    def progress(self) -> None:
        self.balancer.progress(self.draw.choice(self.live), self.draw.choice([0, 1, 1, 40]))

    def remove(self) -> None:
        request_id = self.live.pop(self.draw.randrange(len(self.live)))
        self.balancer.remove(request_id, finished=self.draw.random() < 0.5)


def _any_traffic(traffic: Traffic) -> None:
    """Requests come, go on and end in any order, some before their first token."""
    for _ in range(2000):
        move = traffic.draw.random()
        if move < 0.3 or not traffic.live:
            traffic.add()
        elif move < 0.7:
            traffic.progress()
        else:
            traffic.remove()
    while traffic.live:
        traffic.remove()


def _every_rank_is_used(traffic: Traffic) -> None:
    used = {traffic.add() for _ in range(50 * traffic.num_ranks)}
    unused = sorted(set(range(traffic.num_ranks)) - used)
    assert not unused, f"{50 * traffic.num_ranks} live requests, and none on the ranks {unused}"


def _an_id_comes_again(traffic: Traffic) -> None:
    """Clients may choose ids; they are unique among live requests only."""
    for _ in range(3):
        traffic.add("again")
        traffic.progress()
        traffic.remove()


def _nothing_is_kept(traffic: Traffic) -> None:
    """Of requests with prompts that are too short to be worth remembering."""

    def serve(count: int) -> None:
        for number in range(count):
            traffic.add(num_prompt_tokens=BLOCK_TOKENS - 1)
            if number % 3:
                traffic.progress()
            traffic.remove()

    serve(500)  # what is made once
    tracemalloc.start()
    try:
        begin, _ = tracemalloc.get_traced_memory()
        serve(2000)
        kept = (tracemalloc.get_traced_memory()[0] - begin) / 2000
    finally:
        tracemalloc.stop()
    assert kept <= MOST_KEPT_BYTES, f"{kept:.0f} bytes are kept of each request that has ended"


_CHECKS: dict[str, Callable[[Traffic], None]] = {
    "any_traffic": _any_traffic,
    "every_rank_is_used": _every_rank_is_used,
    "an_id_comes_again": _an_id_comes_again,
    "nothing_is_kept": _nothing_is_kept,
}
CASES = [Case(check, num_ranks) for check in _CHECKS for num_ranks in (2, 3, 8)]
