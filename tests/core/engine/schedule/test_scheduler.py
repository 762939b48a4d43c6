"""The scheduler by example: what it plans, when, and what it answers."""

from typing import Any

import pytest

from core.interfaces.messages import (
    Abort,
    RequestOutput,
    ScheduledStep,
)
from tests.support.small_scheduler import (
    EOS,
    commit,
    generate,
    new_scheduler,
    plan,
    rows,
    table,
)

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


# Aborts


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "in flight", "running", "preempted"])
def test_abort_frees_everything_and_answers_nothing(stage: str) -> None:
    scheduler = new_scheduler(
        num_pages=4, max_running_requests=2, chunked_prefill_size=3, disable_prefix_cache=True
    )
    scheduler.admit([generate("keep", [10, 11, 12])])
    in_flight: list[ScheduledStep] = []
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
