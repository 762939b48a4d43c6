"""What the balancer keeps together, and how far; no server is needed for that."""

import pytest
from acme_balancer import AcmeOptions, register_balancer
from acme_balancer.rendezvous import Rendezvous

from core.errors import ConfigError
from core.interfaces.balancer import BalancerSpec, RequestView
from core.interfaces.messages import EngineStats
from core.plugin.plugin_manager import PluginManager
from core.settings.config import PluginChoice
from core.testing.balancer import CASES, Case, check_balancer

NUM_RANKS = 4


def request(request_id: str, *hashes: int) -> RequestView:
    return RequestView(
        request_id,
        num_prompt_tokens=64 * len(hashes) + 5,
        max_tokens=100,
        fills_max_tokens=False,
        priority=0,
        prefix_hashes=lambda: hashes,
    )


def make(**options: float) -> Rendezvous:
    """As the server makes it of `parallel.dp_balancer_options`."""
    table = PluginManager.load().table("balancer")
    spec = BalancerSpec(NUM_RANKS, block_tokens=64)
    made = table.create(PluginChoice(name="acme", options=options), spec)
    assert isinstance(made, Rendezvous)
    return made


def add(balancer: Rendezvous, request: RequestView) -> int:
    return balancer.add(request, [EngineStats() for _ in range(NUM_RANKS)])


def test_the_same_beginning_meets_on_one_rank() -> None:
    """One after the other; only the first two blocks are looked at."""
    balancer = make(num_blocks=2)
    ranks: dict[int, set[int]] = {}
    for number in range(200):
        beginning = number % 20
        rank = add(balancer, request(str(number), beginning, beginning + 1000, number))
        ranks.setdefault(beginning, set()).add(rank)
        balancer.remove(str(number), finished=True)
    assert all(len(found) == 1 for found in ranks.values())
    assert set.union(*ranks.values()) == set(range(NUM_RANKS))


def test_no_rank_has_many_more_than_the_mean() -> None:
    balancer = make(most_over_mean=1.25)
    for number in range(400):
        add(balancer, request(str(number), 7, 8, 9, 10))
    live = balancer._num_live
    assert sum(live) == 400
    assert 1.2 * 100 < max(live) <= 1.25 * 100
    for number in range(400):
        balancer.remove(str(number), finished=False)
    assert balancer._num_live == [0] * NUM_RANKS
    assert not balancer._rank_of


def test_short_prompts_are_spread() -> None:
    balancer = make(most_over_mean=100.0)
    ranks = [add(balancer, request(str(number))) for number in range(400)]
    assert all(ranks.count(rank) > 50 for rank in range(NUM_RANKS))


@pytest.mark.parametrize("most_over_mean", [1.0, 1.01, 3.0])
def test_some_rank_is_always_allowed(most_over_mean: float) -> None:
    balancer = make(most_over_mean=most_over_mean)
    for number in range(200):
        add(balancer, request(str(number), 7))
        if number % 3 == 2:
            balancer.remove(str(number - 1), finished=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    [registration] = register_balancer()
    check_balancer(registration, case)


@pytest.mark.parametrize("options", [{"num_blocks": 0}, {"most_over_mean": 0.5}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)
    assert AcmeOptions().num_blocks == 4
