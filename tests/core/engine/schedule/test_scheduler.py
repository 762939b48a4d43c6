"""The scheduler by example: what it plans, when, and what it answers."""

from typing import Any

import pytest

from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import (
    Abort,
    Generate,
    RequestOutput,
    SamplingParams,
    StepPlan,
    StepResult,
)
from core.settings.config import EngineConfig
from tests.support.fake_runner import FakeRunner

EOS = 2
PAGE_SIZE = 4


def generate(request_id: str, prompt: list[int], **sampling: Any) -> Generate:
    return Generate(
        request_id=request_id,
        prompt_ids=prompt,
        sampling=SamplingParams(**({"max_tokens": 100} | sampling)),
    )


def new_scheduler(
    num_pages: int = 101, max_model_len: int = 1000, headroom_tokens: int = 0, **config: Any
) -> Scheduler:
    return Scheduler(
        EngineConfig(**({"page_size": PAGE_SIZE, "max_running_requests": 4} | config)),
        num_pages=num_pages,
        max_model_len=max_model_len,
        eos_ids=[EOS],
        headroom_tokens=headroom_tokens,
    )


def plan(scheduler: Scheduler) -> StepPlan:
    planned = scheduler.next_batch()
    assert planned is not None
    scheduler.check()
    return planned


def commit(scheduler: Scheduler, planned: StepPlan, *token_ids: int) -> list[RequestOutput]:
    outputs = scheduler.commit(planned, StepResult(list(token_ids), {}, {}))
    scheduler.check()
    return outputs


def rows(planned: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(slot, start, length, samples) of each row."""
    return list(zip(planned.slots, planned.starts, planned.lengths, planned.samples, strict=True))


def table(planned: StepPlan) -> dict[tuple[int, int], int]:
    entries = zip(planned.table_slots, planned.table_columns, strict=True)
    return dict(zip(entries, planned.table_pages, strict=True))


# One request


def test_a_request_is_prefilled_then_decoded_until_eos() -> None:
    scheduler = new_scheduler()
    assert scheduler.admit([generate("a", [10, 11, 12, 13, 14])]) == []
    first = plan(scheduler)
    assert [(init.slot, init.token_ids, init.num_prompt) for init in first.inits] == [
        (0, [10, 11, 12, 13, 14], 5)
    ]
    assert (first.num_decodes, rows(first)) == (0, [(0, 0, 5, True)])
    assert set(table(first)) == {(0, 0), (0, 1)}
    assert commit(scheduler, first, 20) == [RequestOutput("a", [20], num_cached_tokens=0)]

    second = plan(scheduler)
    assert second.inits == []
    assert (second.num_decodes, rows(second)) == (1, [(0, 5, 1, True)])
    assert commit(scheduler, second, EOS) == [
        RequestOutput("a", [EOS], finish_reason="stop", stop_token_id=EOS)
    ]
    assert not scheduler.has_work
    assert scheduler.next_batch() is None


def test_the_next_step_is_planned_before_the_token_it_reads_is_known() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10])])
    first, second = plan(scheduler), plan(scheduler)
    assert rows(second) == [(0, 1, 1, True)]
    commit(scheduler, first, 20)
    third = plan(scheduler)
    assert rows(third) == [(0, 2, 1, True)]
    assert commit(scheduler, second, EOS)[0].finish_reason == "stop"
    # Step 3 was in flight when the answer ended: what it yields is nobody's.
    assert scheduler.next_batch() is None
    assert scheduler.has_work
    assert commit(scheduler, third, 21) == []
    assert not scheduler.has_work


def test_a_slot_given_on_while_a_stale_row_is_in_flight_gets_no_foreign_token() -> None:
    scheduler = new_scheduler(max_running_requests=1)
    scheduler.admit([generate("a", [10]), generate("b", [30])])
    first, second = plan(scheduler), plan(scheduler)
    commit(scheduler, first, EOS)
    third = plan(scheduler)
    assert [init.token_ids for init in third.inits] == [[30]]
    assert commit(scheduler, second, 99) == []
    assert commit(scheduler, third, 40) == [RequestOutput("b", [40], num_cached_tokens=0)]


def test_a_page_is_announced_in_the_step_that_first_writes_to_it() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10, 11])])
    told = []
    for _ in range(8):
        planned = plan(scheduler)
        told.append(set(table(planned)))
        commit(scheduler, planned, 20)
    # Positions 0-1 in step 1, 2 and 3 next, then 4 opens column 1, and 8 column 2.
    assert told == [{(0, 0)}, set(), set(), {(0, 1)}, set(), set(), set(), {(0, 2)}]


# Ends


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "num_pages", "answer_tokens"),
    [(3, 1000, 101, 3), (1, 1000, 101, 1), (100, 8, 101, 6), (100, 1000, 3, 7)],
    ids=["max_tokens", "one", "max_model_len", "pool"],
)
def test_length_is_foreseen(
    max_tokens: int, max_model_len: int, num_pages: int, answer_tokens: int
) -> None:
    scheduler = new_scheduler(max_model_len=max_model_len, num_pages=num_pages)
    scheduler.admit([generate("a", [10, 11], max_tokens=max_tokens)])
    plans = []
    outputs: list[RequestOutput] = []
    while (planned := scheduler.next_batch()) is not None:
        plans.append(planned)
        if len(plans) > 1:
            outputs += commit(scheduler, plans[-2], 20)
    outputs += commit(scheduler, plans[-1], 20)
    assert len(plans) == len(outputs) == answer_tokens  # no row was planned in vain
    assert [output.finish_reason for output in outputs] == [None] * (answer_tokens - 1) + ["length"]
    assert not scheduler.has_work


def test_max_tokens_0_computes_the_prompt_and_samples_nothing() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10, 11], max_tokens=0)])
    planned = plan(scheduler)
    assert rows(planned) == [(0, 0, 2, False)]
    assert commit(scheduler, planned) == [
        RequestOutput("a", [], finish_reason="length", num_cached_tokens=0)
    ]


@pytest.mark.parametrize(
    ("sampling", "tokens", "stopped_by"),
    [
        ({}, [5, EOS], EOS),
        ({"ignore_eos": True, "stop_token_ids": [7]}, [EOS, 5, 7], 7),
        ({"stop_token_ids": [7]}, [7], 7),
        ({"stop_token_ids": [7]}, [EOS], EOS),
        ({"min_tokens": 2}, [EOS, EOS, EOS], EOS),  # the sampler should not have chosen those
        ({"min_tokens": 1, "stop_token_ids": [7]}, [7, 7], 7),
        ({"max_tokens": 2}, [5, EOS], EOS),
    ],
)
def test_stop_tokens(sampling: dict[str, Any], tokens: list[int], stopped_by: int) -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10], **sampling)])
    outputs = [commit(scheduler, plan(scheduler), token)[0] for token in tokens]
    assert [output.token_ids for output in outputs] == [[token] for token in tokens]
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(tokens) - 1)
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stopped_by)


@pytest.mark.parametrize(
    ("num_prompt", "num_pages", "max_model_len", "said"),
    [
        (0, 101, 1000, ["no tokens"]),
        (1000, 1001, 1000, ["1000 tokens", "at most 999", "model.max_model_len"]),
        (12, 4, 1000, ["12 tokens", "at most 11", "engine.kv_cache_tokens"]),
    ],
)
def test_a_prompt_that_can_never_run_is_answered_at_once(
    num_prompt: int, num_pages: int, max_model_len: int, said: list[str]
) -> None:
    scheduler = new_scheduler(num_pages=num_pages, max_model_len=max_model_len)
    (answer,) = scheduler.admit([generate("a", [5] * num_prompt)])
    assert (answer.finish_reason, answer.token_ids) == ("error", [])
    assert answer.error is not None
    assert all(part in answer.error for part in said), answer.error
    assert not scheduler.has_work
    if num_prompt:
        assert scheduler.admit([generate("a", [5] * (num_prompt - 1))]) == []
        plan(scheduler)


# Sharing a step


def test_decodes_come_first_and_prompts_are_computed_in_chunks_beside_them() -> None:
    scheduler = new_scheduler(chunked_prefill_size=6)
    scheduler.admit([generate("a", [10])])
    commit(scheduler, plan(scheduler), 20)
    scheduler.admit([generate("b", list(range(100, 114)))])
    seen = []
    for _ in range(4):
        planned = plan(scheduler)
        seen.append((planned.num_decodes, rows(planned)[1:]))
        commit(scheduler, planned, *[20] * sum(planned.samples))
    assert seen == [
        (1, [(1, 0, 6, False)]),
        (1, [(1, 6, 6, False)]),
        (1, [(1, 12, 2, True)]),
        (2, [(1, 14, 1, True)]),
    ]


def test_prompts_share_the_budget_of_a_step() -> None:
    scheduler = new_scheduler(chunked_prefill_size=6, max_prefill_tokens=8)
    scheduler.admit([generate(str(base), [base] * 7) for base in (10, 20, 30)])
    assert rows(plan(scheduler)) == [(0, 0, 6, False), (1, 0, 2, False)]
    assert rows(plan(scheduler)) == [(0, 6, 1, True), (1, 2, 5, True), (2, 0, 2, False)]


def test_without_chunks_a_prompt_larger_than_the_budget_runs_alone() -> None:
    scheduler = new_scheduler(chunked_prefill_size=-1, max_prefill_tokens=8)
    scheduler.admit([generate(str(base), [base] * 20) for base in (10, 20)])
    scheduler.admit([generate(str(base), [base] * 4) for base in (30, 40)])
    lengths = [planned.lengths for planned in (plan(scheduler), plan(scheduler))]
    assert lengths == [[20], [1, 20]]
    scheduler = new_scheduler(chunked_prefill_size=-1, max_prefill_tokens=8)
    scheduler.admit([generate(str(base), [base] * length) for base, length in ((10, 4), (20, 20))])
    scheduler.admit([generate("30", [30] * 3)])
    # The large one does not fit beside the first; who takes what it leaves does not delay it.
    lengths = [plan(scheduler).lengths, plan(scheduler).lengths]
    assert lengths == [[4, 3], [1, 1, 20]]


def test_no_more_requests_run_than_allowed() -> None:
    scheduler = new_scheduler(max_running_requests=2)
    scheduler.admit([generate(str(base), [base]) for base in (10, 20, 30)])
    first = plan(scheduler)
    assert first.slots == [0, 1]
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (2, 1)
    commit(scheduler, first, EOS, 5)
    second = plan(scheduler)
    assert [init.slot for init in second.inits] == [0]
    assert rows(second) == [(1, 1, 1, True), (0, 0, 1, True)]


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


# Aborts


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "in flight", "running", "preempted"])
def test_abort_frees_everything_and_answers_nothing(stage: str) -> None:
    scheduler = new_scheduler(
        num_pages=4, max_running_requests=2, chunked_prefill_size=3, disable_prefix_cache=True
    )
    scheduler.admit([generate("keep", [10, 11, 12])])
    in_flight: list[StepPlan] = []
    if stage == "waiting":
        scheduler.admit([generate("drop", [20] * 3)])
    elif stage == "prefilling":
        scheduler.admit([generate("drop", [20] * 4)])
        in_flight = [plan(scheduler)]
    elif stage == "in flight":
        scheduler.admit([generate("drop", [20] * 3)])
        in_flight = [plan(scheduler), plan(scheduler)]
    else:
        scheduler.admit([generate("drop", [20] * 3)])
        for _ in range(2):
            commit(scheduler, plan(scheduler), 5, 6)
        if stage == "preempted":
            in_flight = [plan(scheduler)]
            assert scheduler.stats().num_preemptions == 1
    assert scheduler.admit([Abort(["drop", "unknown"])]) == []
    scheduler.check()
    stats = scheduler.stats()
    assert stats.num_running + stats.num_waiting == 1
    for planned in in_flight:
        outputs = commit(scheduler, planned, *[7] * sum(planned.samples))
        assert {output.request_id for output in outputs} == {"keep"}
    scheduler.admit([Abort(["keep"])])
    scheduler.check()
    stats = scheduler.stats()
    assert stats.kv_pages_free == stats.kv_pages_total == 3
    assert not scheduler.has_work


def test_an_id_can_be_used_again_after_an_abort() -> None:
    scheduler = new_scheduler()
    scheduler.admit([generate("a", [10])])
    first = plan(scheduler)
    scheduler.admit([Abort(["a"]), generate("a", [11])])
    second = plan(scheduler)
    assert commit(scheduler, first, 20) == []
    assert commit(scheduler, second, 21) == [RequestOutput("a", [21], num_cached_tokens=0)]


# The rest


def test_seeds_are_the_request_s_own_or_drawn_from_the_engine_s() -> None:
    def seeds(engine_seed: int) -> list[int]:
        scheduler = new_scheduler(seed=engine_seed)
        for request_id, seed in (("a", None), ("b", 7), ("c", -1), ("d", None)):
            scheduler.admit([generate(request_id, [5], seed=seed)])
        return [init.seed for init in plan(scheduler).inits]

    one = seeds(1)
    assert one == seeds(1)
    assert one[1:3] == [7, 2**64 - 1] == seeds(2)[1:3]
    assert one[0] != one[3]
    assert not {one[0], one[3]} & {seeds(2)[0], seeds(2)[3]}
    assert all(0 <= seed < 2**64 for seed in one)


def test_stats_count_what_was_computed_and_what_was_found() -> None:
    scheduler = new_scheduler()
    for request_id in "ab":
        scheduler.admit([generate(request_id, list(range(50, 59)))])
        commit(scheduler, plan(scheduler), 20)
        commit(scheduler, plan(scheduler), EOS)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (9 + 1, 8)
    assert (stats.generated_tokens, stats.num_steps) == (4, 4)
    assert (stats.kv_pages_total, stats.kv_pages_free, stats.kv_pages_cached) == (100, 98, 2)
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (0, 0, 0)


def test_a_plan_is_not_changed_by_later_ones() -> None:
    scheduler = new_scheduler(page_size=1)
    scheduler.admit([generate("a", [10]), generate("b", [20])])
    plans = [plan(scheduler)]
    copies = [repr(plans[0])]
    for _ in range(6):
        plans.append(plan(scheduler))
        copies.append(repr(plans[-1]))
        commit(scheduler, plans[-2], *[20] * len(plans[-2].slots))
    scheduler.admit([Abort(["a"]), generate("c", [30])])
    plan(scheduler)
    assert [repr(planned) for planned in plans] == copies
