"""The scheduler by example: prefixes that are cached, and room where there is little."""

from tests.support.fake_runner import FakeRunner
from tests.support.small_scheduler import (
    EOS,
    PAGE_SIZE,
    commit,
    generate,
    new_scheduler,
    plan,
    rows,
    table,
)

# Prefix cache


def test_a_prompt_starts_after_the_pages_that_are_cached() -> None:
    scheduler = new_scheduler()
    system = list(range(50, 58))  # two pages
    scheduler.admit([generate("a", [*system, 10])])
    first = plan(scheduler)
    scheduler.admit([generate("b", [*system, 11])])
    second = plan(scheduler)  # a still runs
    assert rows(second) == [(0, 9, 1, True), (1, 8, 1, True)]
    pages_a, pages_b = table(first), table(second)
    assert [pages_b[1, column] for column in (0, 1)] == [pages_a[0, column] for column in (0, 1)]
    assert pages_b[1, 2] != pages_a[0, 2]
    commit(scheduler, first, 20)
    assert commit(scheduler, second, 20, 21)[1].num_cached_tokens == 8


def test_one_token_at_least_is_computed() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", list(range(50, 58)))])
    commit(scheduler, plan(scheduler), EOS)
    scheduler.admit([generate("b", list(range(50, 58)))])
    planned = plan(scheduler)
    assert rows(planned) == [(0, 4, 4, True)]
    assert commit(scheduler, planned, EOS)[0].num_cached_tokens == 4


def test_answers_are_cached_too() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10, 11], max_tokens=4)])
    for token in (20, 21, 22, 23):
        commit(scheduler, plan(scheduler), token)
    # 23 was never computed, so [10, 11, 20, 21] is what can be continued.
    scheduler.admit([generate("b", [10, 11, 20, 21, 22, 23, 99])])
    assert rows(plan(scheduler)) == [(0, 4, 3, True)]


def test_a_request_waits_a_step_for_a_prefix_that_is_being_computed() -> None:
    scheduler = new_scheduler()
    prompt = list(range(50, 59))
    scheduler.admit([generate("a", prompt), generate("b", prompt), generate("c", [10])])
    first, second = plan(scheduler), plan(scheduler)
    assert [init.token_ids for init in first.inits] == [prompt, [10]]
    assert [(init.slot, init.token_ids) for init in second.inits] == [(2, prompt)]
    assert rows(second)[-1] == (2, 8, 1, True)


def test_a_page_computed_twice_is_replaced_by_the_cached_one() -> None:
    scheduler = new_scheduler()
    prompt = [50, 51, 52, 53]
    scheduler.admit([generate("a", [*prompt, *range(60, 70)])])
    scheduler.admit([generate("b", [*prompt, *range(70, 80)])])  # too little in common to wait
    first, second = plan(scheduler), plan(scheduler)
    assert table(first)[0, 0] != table(first)[1, 0]
    assert table(second) == {(1, 0): table(first)[0, 0]}


def test_without_the_cache_nothing_is_shared() -> None:
    scheduler = new_scheduler(disable_prefix_cache=True)
    for request_id in "ab":
        scheduler.admit([generate(request_id, list(range(50, 59)))])
        planned = plan(scheduler)
        assert rows(planned) == [(0, 0, 9, True)]
        assert commit(scheduler, planned, EOS)[0].num_cached_tokens == 0
    stats = scheduler.stats()
    assert (stats.kv_pages_free, stats.kv_pages_cached) == (100, 0)


def test_prompt_logprobs_are_computed_for_every_position_and_told_once() -> None:
    scheduler = new_scheduler(chunked_prefill_size=6)
    runner = FakeRunner(PAGE_SIZE, 101)
    prompt = list(range(8, 21))
    outputs = []
    for request_id in "ab":  # b finds a's pages, but may not use them
        scheduler.admit([generate(request_id, prompt, prompt_logprobs=0, max_tokens=2)])
        while scheduler.has_work:
            planned = plan(scheduler)
            outputs += scheduler.commit(planned, runner.run(planned))
    first_a, _, first_b, second_b = outputs
    for first in (first_a, first_b):
        assert first.prompt_logprobs is not None
        assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
        assert first.num_cached_tokens == 0
    assert second_b.prompt_logprobs is None


# Room


def test_preemption_keeps_the_tokens_and_the_seed_and_goes_to_the_front() -> None:
    scheduler = new_scheduler(num_pages=4, max_running_requests=3, disable_prefix_cache=True)
    scheduler.admit([generate("old", [10, 11, 12]), generate("young", [20, 21, 22])])
    first = plan(scheduler)
    scheduler.admit([generate("new", [30, 31, 32, 33, 34])])
    second = plan(scheduler)
    commit(scheduler, first, 40, 50)
    third = plan(scheduler)  # both open a new page at position 4, and one page is left
    assert rows(third) == [(0, 4, 1, True)]
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (1, 2, 1)
    # What the step in flight still yields counts.
    assert [output.token_ids for output in commit(scheduler, second, 41, 51)] == [[41], [51]]
    assert scheduler.next_batch() is not None
    assert commit(scheduler, third, EOS)[0].finish_reason == "stop"
    resumed = plan(scheduler)
    (again,) = resumed.inits
    assert again.token_ids == [20, 21, 22, 50, 51]
    assert (again.num_prompt, again.seed) == (3, first.inits[1].seed)
    assert rows(resumed) == [(again.slot, 0, 5, True)]


def test_a_preempted_request_finds_its_own_pages_if_nobody_took_them() -> None:
    scheduler = new_scheduler(num_pages=5, max_running_requests=2)
    scheduler.admit([generate("old", [10, 11, 12, 13, 14, 15]), generate("young", [20, 21, 22])])
    planned = plan(scheduler)
    tokens = iter(range(100, 200))
    while scheduler.stats().num_preemptions == 0:
        commit(scheduler, planned, *[next(tokens) for _ in range(sum(planned.samples))])
        planned = plan(scheduler)
    assert planned.slots == [0]
    commit(scheduler, planned, EOS)
    resumed = plan(scheduler)
    assert resumed.starts == [4]
    assert len(resumed.inits[0].token_ids) > 4


def test_a_request_in_its_last_step_gives_its_pages_before_another_is_preempted() -> None:
    scheduler = new_scheduler(num_pages=3, disable_prefix_cache=True)
    scheduler.admit([generate("goes", [10, 11, 12], max_tokens=2), generate("stays", [20, 21, 22])])
    first, second = plan(scheduler), plan(scheduler)
    commit(scheduler, first, 40, 50)
    third = plan(scheduler)
    assert rows(third) == [(1, 4, 1, True)]
    assert table(third) == {(1, 1): table(first)[0, 0]}
    assert scheduler.stats().num_preemptions == 0
    outputs = commit(scheduler, second, 41, 51)
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        ([41], "length"),
        ([51], None),
    ]


def test_a_prompt_waits_until_those_that_run_have_headroom() -> None:
    def num_admitted(headroom_tokens: int) -> int:
        scheduler = new_scheduler(num_pages=7, headroom_tokens=headroom_tokens)
        scheduler.admit([generate("a", [10, 11, 12, 13]), generate("b", [20, 21, 22, 23])])
        return len(plan(scheduler).inits)

    assert num_admitted(8) == 2  # 2 pages each, and 6 there are
    assert num_admitted(9) == 1  # 3 each


def test_headroom_is_not_kept_beyond_a_request_s_end() -> None:
    scheduler = new_scheduler(num_pages=5, headroom_tokens=64)
    for request_id in "ab":
        scheduler.admit([generate(request_id, [ord(request_id)] * 4, max_tokens=5)])
    assert len(plan(scheduler).inits) == 2


def test_the_oldest_request_is_never_preempted() -> None:
    scheduler = new_scheduler(num_pages=6, max_running_requests=4)
    runner = FakeRunner(PAGE_SIZE, 6)
    for base in range(10, 18):
        prompt = [base] * 3
        message = generate(str(base), prompt, max_tokens=12, ignore_eos=True)
        scheduler.admit([message])
    finished = []
    while scheduler.has_work:
        planned = plan(scheduler)
        outputs = scheduler.commit(planned, runner.run(planned))
        finished += [output.request_id for output in outputs if output.finish_reason]
    assert finished == sorted(finished)
    assert len(finished) == 8
    assert scheduler.stats().num_preemptions > 0
