"""How the balancers choose: by example, and bounds that hold whatever comes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.interfaces.balancer import Balancer, BalancerSpec
from core.interfaces.messages import SamplingParams
from core.plugin.plugin_manager import PluginManager
from core.serve.balancer import BLOCK_TOKENS, prefix_hashes, request_view
from core.settings.config import PluginChoice
from plugins.balancers._loads import FIRST_GUESS_TOKENS, LEAST_LEFT_TOKENS, ExpectedLoads
from plugins.balancers._options import PrefixAwareOptions
from plugins.balancers.least_tokens import LeastTokens
from plugins.balancers.prefix_aware import PrefixAware
from plugins.balancers.round_robin import RoundRobin

MOST_EXTRA_LOAD = PrefixAwareOptions().most_extra_load
TABLE = PluginManager.load().table("balancer")


def make(name: str, num_ranks: int, **options: float) -> Balancer:
    choice = PluginChoice(name=name, options=options)
    return TABLE.create(choice, BalancerSpec(num_ranks, BLOCK_TOKENS))


def add(balancer: Balancer, request_id: str, prompt_ids, sampling: SamplingParams) -> int:
    return balancer.add(request_view(request_id, prompt_ids, sampling), [])


def full(max_tokens):
    """Answers that get as long as they may."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def test_names():
    kinds = {name: type(make(name, 2)) for name in TABLE}
    assert kinds == {
        "least_tokens": LeastTokens,
        "round_robin": RoundRobin,
        "prefix_aware": PrefixAware,
    }


def test_round_robin_goes_around():
    balancer = make("round_robin", 3)
    assert [add(balancer, str(i), [1], full(1)) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_least_tokens_counts_prompts_and_what_is_left_of_answers():
    balancer = make("least_tokens", 2)
    assert add(balancer, "a", [0] * 100, full(50)) == 0
    assert add(balancer, "b", [0] * 10, full(50)) == 1
    assert add(balancer, "c", [0] * 10, full(50)) == 1
    assert balancer.loads == [150, 120]
    balancer.progress("a", 1)  # its prompt is computed
    assert balancer.loads == [49, 120]
    balancer.progress("a", 9)
    assert balancer.loads == [40, 120]
    balancer.remove("b", finished=False)
    balancer.remove("a", finished=True)
    assert balancer.loads == [0, 60]


def test_equal_ranks_get_requests_in_turn():
    """Also where every request ends before the next one comes."""
    balancer = make("least_tokens", 3)
    got = []
    for i in range(6):
        got.append(add(balancer, str(i), [0] * 5, full(5)))
        balancer.remove(str(i), finished=True)
    assert got == [0, 1, 2, 0, 1, 2]


def test_the_length_of_answers_is_learnt():
    balancer = make("least_tokens", 1)
    open_end = SamplingParams(max_tokens=100_000)
    add(balancer, "first", [], open_end)
    assert balancer.loads == [FIRST_GUESS_TOKENS]
    balancer.progress("first", FIRST_GUESS_TOKENS)
    assert balancer.loads == [LEAST_LEFT_TOKENS], "it may go on"
    balancer.remove("first", finished=False)
    for i in range(200):
        add(balancer, str(i), [], open_end)
        balancer.progress(str(i), 40)
        balancer.remove(str(i), finished=True)
    add(balancer, "last", [], open_end)
    assert balancer.loads == [pytest.approx(40, abs=1)]
    add(balancer, "short", [], SamplingParams(max_tokens=3))
    assert balancer.loads == [pytest.approx(43, abs=1)]


def prompt(seed, num_blocks, rest=5):
    draw = random.Random(seed)
    return [draw.randrange(100_000) for _ in range(num_blocks * BLOCK_TOKENS + rest)]


def test_a_known_prefix_draws_requests_to_its_rank():
    balancer = make("prefix_aware", 3)
    system = prompt("system", 8)
    assert add(balancer, "a", [*system, 1], full(10)) == 0
    assert add(balancer, "b", prompt("other", 8), full(10)) == 1
    balancer.progress("a", 1)
    assert add(balancer, "c", [*system, 2, 3], full(10)) == 0, "though rank 2 does nothing"
    assert balancer.loads == [9 + 5 + 2 + 10, 8 * BLOCK_TOKENS + 5 + 10, 0]
    assert add(balancer, "d", prompt("third", 8), full(10)) == 2
    assert add(balancer, "e", prompt("other", 8)[:40], full(10)) == 0, "less than a block"


def test_a_known_prefix_is_passed_over_where_its_rank_is_too_busy():
    balancer = make("prefix_aware", 2)
    system = prompt("system", 4, rest=0)
    ranks = [add(balancer, str(i), system, full(100)) for i in range(8)]
    assert ranks[0] == 0
    assert set(ranks) == {0, 1}
    saved = 4 * BLOCK_TOKENS
    one = saved + 100
    assert max(balancer.loads) <= min(balancer.loads) * (1 + MOST_EXTRA_LOAD) + saved + one


def test_of_ranks_that_know_as_much_the_idler_one_is_chosen():
    balancer = make("prefix_aware", 3)
    system = prompt("system", 4)
    for rank in (0, 1):
        balancer._remember(rank, prefix_hashes(system))
    add(balancer, "a", [1] * 20, full(10))
    assert balancer.loads == [30, 0, 0]
    assert add(balancer, "b", system, full(10)) == 1


def test_what_was_not_used_for_long_is_forgotten_first_and_the_ends_before_the_beginnings():
    balancer = make("prefix_aware", 1, blocks_per_rank=6)
    old, new = prompt("old", 4), prompt("new", 4)
    add(balancer, "a", old, full(1))
    add(balancer, "b", new, full(1))
    assert balancer._num_known(0, prefix_hashes(new)) == 4
    assert balancer._num_known(0, prefix_hashes(old)) == 2
    assert len(balancer._known[0]) == 6


def test_prefixes_are_of_whole_blocks_and_of_everything_before():
    first, second = prompt(1, 1, rest=0), prompt(2, 1, rest=0)
    assert prefix_hashes([]) == []
    assert prefix_hashes(first[:-1]) == []
    ab, cb = prefix_hashes(first + second), prefix_hashes(second + second)
    assert ab[0] == prefix_hashes(first + [7] * 10)[0]
    assert len(ab) == len(cb) == 2
    assert ab[1] != cb[1], "the same block after another beginning"


request = st.tuples(
    st.integers(0, 3),  # which of some prompts
    st.integers(1, 6 * BLOCK_TOKENS),  # how much of it
    st.integers(0, 500),  # max_tokens
    st.booleans(),  # ignore_eos
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(TABLE)),
    num_ranks=st.integers(1, 5),
    moves=st.lists(st.tuples(st.sampled_from("aaaptd"), request, st.integers(0, 99)), max_size=60),
)
def test_requests_go_to_ranks_there_are_and_loads_are_those_of_live_ones(name, num_ranks, moves):
    balancer = make(name, num_ranks)
    prompts = [prompt(seed, 6) for seed in range(4)]
    live = {}
    for number, (move, (which, length, max_tokens, ignore_eos), chosen) in enumerate(moves):
        if move == "a" or not live:
            sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
            live[str(number)] = add(balancer, str(number), prompts[which][:length], sampling)
            continue
        request_id = list(live)[chosen % len(live)]
        if move == "p":
            balancer.progress(request_id, chosen)
        else:
            balancer.remove(request_id, finished=move == "t")
            del live[request_id]
    assert set(live.values()) <= set(range(num_ranks))
    if isinstance(balancer, ExpectedLoads):
        assert all(load >= 0 for load in balancer.loads)
        idle = set(range(num_ranks)) - set(live.values())
        assert all(balancer.loads[rank] == 0 for rank in idle)
    for request_id in live:
        balancer.remove(request_id, finished=True)
    if isinstance(balancer, ExpectedLoads):
        assert balancer.loads == [0] * num_ranks


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["least_tokens", "prefix_aware"]),
    num_ranks=st.integers(2, 5),
    requests=st.lists(request, max_size=50),
)
def test_imbalance_is_bounded_while_nothing_ends(name, num_ranks, requests):
    """By one request; with prefixes also by what the busier rank need not compute, and a share."""
    balancer = make(name, num_ranks)
    prompts = [prompt(seed, 6) for seed in range(4)]
    largest = 0
    for number, (which, length, max_tokens, ignore_eos) in enumerate(requests):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        before = list(balancer.loads)
        rank = add(balancer, str(number), prompts[which][:length], sampling)
        largest = max(largest, balancer.loads[rank] - before[rank])
        spread = max(balancer.loads) - min(balancer.loads)
        if name == "least_tokens":
            assert spread <= largest
        else:
            saved = length // BLOCK_TOKENS * BLOCK_TOKENS
            assert before[rank] <= min(before) * (1 + MOST_EXTRA_LOAD) + saved
