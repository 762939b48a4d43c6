"""Who gets a step's prompt tokens: the oldest as much as all shorter ones; and who waits."""

from typing import Any

import pytest

from core.engine.schedule.pace import Pace
from core.engine.schedule.prompt_budget import LEAST_BASE_COSTS, LEAST_TOKENS
from core.engine.schedule.prompt_order import LONG_SHARE
from core.engine.schedule.scheduler import EXPIRY_INTERVAL_S, QUEUE_TIMEOUT, Scheduler
from core.interfaces.messages import Generate, SamplingParams, ScheduledStep, StepResult
from core.settings.config import EngineConfig

PAGE = 4


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def new_scheduler(pace: Pace | None = None, num_pages: int = 400, **config: Any) -> Scheduler:
    fields = {"page_size": PAGE, "max_running_requests": 16, "max_prefill_tokens": 64}
    return Scheduler(
        EngineConfig(**(fields | config)),
        num_pages=num_pages,
        max_model_len=4096,
        eos_ids=[],
        pace=pace or Pace(),
        clock=Clock(),
    )


def prompt(name: str, length: int, **fields: Any) -> Generate:
    """Prompts of different names share nothing."""
    start = 1000 * (sum(map(ord, name)) + 1)
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 4), **fields.pop("sampling", {}))
    return Generate(name, list(range(start, start + length)), sampling, **fields)


def turn(scheduler: Scheduler) -> dict[str, int]:
    """Plan and commit a step; prompt tokens computed by request."""
    names = {request.slot: name for name, request in scheduler._live.items()}
    plan = scheduler.next_batch()
    if plan is None:
        return {}
    names |= {request.slot: name for name, request in scheduler._live.items()}
    scheduler.check()
    num = plan.num_decodes
    scheduler.commit(plan, result_of(plan))
    return {
        names[slot]: length
        for slot, length in zip(plan.slots[num:], plan.lengths[num:], strict=True)
    }


def result_of(plan: ScheduledStep) -> StepResult:
    return StepResult([7] * sum(plan.samples), {}, {})


def test_short_prompts_pass_long_ones_which_lose_no_more_than_half() -> None:
    scheduler = new_scheduler()
    scheduler.admit([prompt(name, 640) for name in "ABC"])
    assert turn(scheduler) == {"A": 64}
    scheduler.admit([prompt("s", 10), prompt("t", 5)])
    assert turn(scheduler) == {"A": 49, "t": 5, "s": 10}
    scheduler.admit([prompt(f"flood {i}", 20) for i in range(9)])
    served = turn(scheduler)
    assert served.pop("A") == 32
    assert sum(served.values()) == 32
    assert all(name.startswith("flood") for name in served)


def test_a_flood_of_short_prompts_starves_no_long_one() -> None:
    scheduler = new_scheduler(max_running_requests=64)
    scheduler.admit([prompt("long", 640)])
    turns = 0
    while scheduler._live["long"].num_computed < 640:
        scheduler.admit([prompt(f"{turns} {i}", 16, max_tokens=1) for i in range(4)])
        turn(scheduler)
        turns += 1
    assert turns <= 2 * 640 / 64 + 1


def test_what_short_prompts_leave_is_not_wasted() -> None:
    scheduler = new_scheduler(max_running_requests=2)
    scheduler.admit([prompt(name, 640) for name in "AB"])
    turn(scheduler)
    scheduler.admit([prompt("s", 10)])
    turn(scheduler)  # it takes the last slot
    scheduler.admit([prompt("no slot", 10)])
    assert turn(scheduler) == {"A": 64}


@pytest.mark.parametrize("sizes", [(640, 640, 640), (100, 90, 80), (64, 64, 64), (5, 4, 3)])
def test_a_step_is_filled_whatever_waits(sizes: tuple[int, ...]) -> None:
    scheduler = new_scheduler()
    scheduler.admit([prompt(str(i), size) for i, size in enumerate(sizes)])
    left = sum(sizes)
    while left:
        served = sum(turn(scheduler).values())
        assert served == min(left, 64)
        left -= served


def test_a_lower_priority_comes_first_and_is_preempted_last() -> None:
    scheduler = new_scheduler(max_running_requests=1, max_prefill_tokens=8)
    scheduler.admit([prompt("first", 16)])
    assert turn(scheduler) == {"first": 8}
    scheduler.admit(
        [prompt("later", 8, priority=5), prompt("usual", 8), prompt("urgent", 8, priority=-1)]
    )
    order: list[str] = []
    while scheduler.has_work:
        order += [name for name in turn(scheduler) if name not in order]
    assert order == ["first", "urgent", "usual", "later"]

    scheduler = new_scheduler(num_pages=14)
    scheduler.admit([prompt("a", 4, priority=1, max_tokens=28), prompt("b", 4, max_tokens=28)])
    preempted: set[str] = set()
    while scheduler.has_work:
        turn(scheduler)
        preempted |= {
            name
            for name, request in scheduler._live.items()
            if request.slot < 0 and request.has_run
        }
    assert preempted <= {"a"}


def test_who_waits_for_pages_is_passed_for_a_while_only() -> None:
    """A long prompt finds no pages as long as short ones take what is freed."""
    scheduler = new_scheduler(num_pages=41, max_running_requests=16)
    scheduler.admit([prompt(f"run {i}", 12, max_tokens=20) for i in range(2)])
    turn(scheduler)
    scheduler.admit([prompt("large", 140, max_tokens=1)])
    turns, passed = 0, 0
    while not scheduler._live["large"].num_computed:
        scheduler.admit([prompt(f"s{turns}", 9, max_tokens=8)])
        passed += sum(name.startswith("s") for name in turn(scheduler))
        turns += 1
        assert turns < 600, "it starves"
    assert passed == 14, "3 pages each: as many as there are, 40, and no more"
    assert scheduler._live["large"].overtaken_pages == 0


@pytest.mark.parametrize(("num_sharing", "is_reached"), [(4, True), (5, False)])
def test_a_few_that_wait_for_a_prefix_are_looked_past(num_sharing: int, is_reached: bool) -> None:
    """Whose prompt another computes in this step waits a step; a long queue is not searched."""
    scheduler = new_scheduler(max_prefill_tokens=1000)
    shared = list(range(40))
    sharing = [
        Generate(f"s{n}", [*shared, 500 + n], SamplingParams(max_tokens=4))
        for n in range(num_sharing)
    ]
    first = Generate("first", [*shared, 499], SamplingParams(max_tokens=4))
    scheduler.admit([first, *sharing, prompt("other", 60)])
    assert turn(scheduler) == {"first": 41} | ({"other": 60} if is_reached else {})
    assert turn(scheduler) == dict.fromkeys((each.request_id for each in sharing), 1) | (
        {} if is_reached else {"other": 60}
    )


def test_a_request_that_waits_too_long_is_told_before_it_runs() -> None:
    scheduler = new_scheduler(max_running_requests=1)
    clock = scheduler._clock
    assert isinstance(clock, Clock)
    scheduler.admit([prompt("runs", 8, max_tokens=50, queue_timeout_s=5.0)])
    turn(scheduler)
    scheduler.admit([prompt("waits", 8, queue_timeout_s=5.0), prompt("patient", 8)])
    clock.now_s = 4.9
    assert scheduler.admit([]) == []
    clock.now_s = 5.0 + EXPIRY_INTERVAL_S
    (answer,) = scheduler.admit([])
    assert (answer.request_id, answer.finish_reason) == ("waits", "error")
    assert answer.error_code == QUEUE_TIMEOUT
    assert "frontend.queue_timeout_s" in str(answer.error)
    assert set(scheduler._live) == {"runs", "patient"}
    assert scheduler.stats().num_queue_timeouts == 1
    scheduler.check()


def test_a_request_that_was_begun_is_not_told_that_it_waited_too_long() -> None:
    """Pages are too few for both: the later one waits again, and past the time it had."""
    scheduler = new_scheduler(num_pages=20, disable_prefix_cache=True)
    clock = scheduler._clock
    assert isinstance(clock, Clock)
    scheduler.admit([prompt(name, 4, max_tokens=100, queue_timeout_s=5.0) for name in "AB"])
    for _ in range(60):
        turn(scheduler)
    stats = scheduler.stats()
    assert (stats.num_preemptions, stats.num_waiting) == (1, 1)
    clock.now_s = 10.0
    assert scheduler.admit([]) == []
    assert set(scheduler._live) == {"A", "B"}


# Steps that are cut to a time.

PACE = Pace(token_s=0.001, pair_s=1e-6, logprob_s=0.01)


def seconds_of(plan: ScheduledStep) -> float:
    """Of the prompts of a step."""
    rows = range(plan.num_decodes, len(plan.slots))
    prompts = sum(PACE.prompt_s(plan.starts[row], plan.lengths[row], False) for row in rows)
    return prompts + plan.num_logprob_rows * PACE.logprob_s


def test_prompts_of_any_length_are_cut_to_a_time() -> None:
    scheduler = new_scheduler(PACE, num_pages=4000, max_prefill_tokens=8192, cpu_step_s=0.2)
    scheduler.admit([prompt(name, 2000, max_tokens=1) for name in "ABCD"])
    lengths = []
    while scheduler.has_work:
        plan = scheduler.next_batch()
        assert plan is not None
        assert seconds_of(plan) <= 0.2 * 1.001
        lengths.append(sum(plan.lengths[plan.num_decodes :]))
        scheduler.commit(plan, result_of(plan))
    assert max(lengths) > 150
    assert sum(lengths) == 8000
    assert len(lengths) < 100


def test_prompt_logprobs_are_computed_in_pieces() -> None:
    """A row costs eleven times as much with them; all of it at once would take 20 s."""
    scheduler = new_scheduler(PACE, num_pages=4000, max_prefill_tokens=8192, cpu_step_s=0.5)
    scheduler.admit([prompt("A", 2000, max_tokens=1, sampling={"prompt_logprobs": 20})])
    steps = 0
    while scheduler._live["A"].num_computed < 1900:
        plan = scheduler.next_batch()
        assert plan is not None
        assert seconds_of(plan) <= 0.5 * 1.001
        entries = {0: [None] * plan.num_logprob_rows}
        scheduler.commit(plan, StepResult([7] * sum(plan.samples), {}, entries))  # type: ignore
        steps += 1
    assert 38 < steps < 60


def test_a_step_with_short_prompts_is_shorter() -> None:
    scheduler = new_scheduler(PACE, max_prefill_tokens=8192, cpu_step_s=0.4)
    scheduler.admit([prompt("A", 1000)])
    assert turn(scheduler)["A"] > 300
    scheduler.admit([prompt("s", 20)])
    served = turn(scheduler)
    assert served["s"] == 20
    assert 0.8 * LONG_SHARE * 300 < served["A"] < 1.2 * LONG_SHARE * 400


def test_a_slow_machine_computes_something_in_every_step() -> None:
    slow = Pace(token_s=10.0)
    scheduler = new_scheduler(slow, cpu_step_s=0.1)
    scheduler.admit([prompt("A", 60), prompt("B", 3)])
    assert turn(scheduler) == {"A": LEAST_TOKENS}
    while scheduler._live["A"].num_computed < 60:
        turn(scheduler)


@pytest.mark.parametrize(("step_s", "tokens"), [(1.0, 85), (0.1, LEAST_TOKENS)])
def test_decodes_leave_prompts_a_part_of_a_step(step_s: float, tokens: int) -> None:
    pace = Pace(token_s=0.01)
    scheduler = new_scheduler(pace, num_pages=1000, max_prefill_tokens=8192, cpu_step_s=step_s)
    scheduler.admit([prompt(str(i), 4, max_tokens=100) for i in range(15)])
    while len(scheduler._decode) < 15:
        turn(scheduler)
    scheduler.admit([prompt("A", 1000)])
    assert turn(scheduler)["A"] == pytest.approx(tokens, abs=1)


def test_no_time_is_kept_where_the_pace_is_not_known_or_not_wanted() -> None:
    for scheduler in (
        new_scheduler(Pace(), max_prefill_tokens=512),
        new_scheduler(PACE, max_prefill_tokens=512, cpu_step_s=0.0),
    ):
        scheduler.admit([prompt("A", 1000)])
        assert turn(scheduler) == {"A": 512}


def test_a_short_prompt_is_not_forgotten_where_the_oldest_needs_even_less() -> None:
    """What the oldest leaves would else go to the next long one."""
    scheduler = new_scheduler()
    scheduler.admit([prompt("A", 70), prompt("B", 640)])
    assert turn(scheduler) == {"A": 64}
    scheduler.admit([prompt("s", 10)])
    assert turn(scheduler) == {"A": 6, "s": 10, "B": 48}


def test_steps_follow_the_machine_when_it_slows_down_and_recovers() -> None:
    pace = Pace(token_s=0.001)
    scheduler = new_scheduler(pace, num_pages=4000, max_prefill_tokens=8192, cpu_step_s=0.4)
    scheduler.admit([prompt(name, 3000) for name in "ABCD"])
    assert sum(turn(scheduler).values()) == pytest.approx(400, abs=2)
    for _ in range(40):
        scheduler.observe(expected_s=0.1, actual_s=0.2)
    assert sum(turn(scheduler).values()) == pytest.approx(200, abs=2)
    for _ in range(40):
        scheduler.observe(expected_s=0.1, actual_s=0.1)
    assert sum(turn(scheduler).values()) == pytest.approx(400, abs=2)


def test_a_pace_that_was_measured_on_a_busy_machine_does_not_leave_long_steps() -> None:
    """Ten times too slow, as told by the steps that follow: 0.15 s of them, not 1 s."""
    scheduler = new_scheduler(
        Pace(token_s=0.01, base_s=0.1), num_pages=4000, max_prefill_tokens=8192
    )
    scheduler.admit([prompt(name, 3000) for name in "ABCD"])
    for _ in range(40):
        scheduler.observe(expected_s=1.0, actual_s=0.1)
    assert scheduler.step_s == pytest.approx(0.15, rel=0.01)
    assert sum(turn(scheduler).values()) == pytest.approx((0.15 - 0.01) / 0.001, rel=0.05)


def test_a_step_is_never_mostly_what_every_step_costs() -> None:
    pace = Pace(token_s=0.001, base_s=0.1)
    scheduler = new_scheduler(pace, max_prefill_tokens=8192, cpu_step_s=0.1)
    scheduler.admit([prompt("A", 1000)])
    assert turn(scheduler)["A"] == LEAST_BASE_COSTS * 100


def test_a_step_that_costs_much_is_not_long_for_that() -> None:
    """The pace was measured on a busy machine, which became busier."""
    pace = Pace(token_s=0.006, base_s=0.3)
    scheduler = new_scheduler(pace, num_pages=4000, max_prefill_tokens=8192)
    scheduler.admit([prompt(name, 3000) for name in "ABCD"])
    for _ in range(40):
        scheduler.observe(expected_s=1.0, actual_s=2.0)
    assert sum(turn(scheduler).values()) * 0.006 * 2.0 == pytest.approx(0.5, abs=0.02)


def test_whether_prompts_take_long() -> None:
    scheduler = new_scheduler(Pace(token_s=0.001))
    assert not scheduler.has_prompts_for(0.01)
    scheduler.admit([prompt("A", 60), prompt("B", 60)])
    assert scheduler.has_prompts_for(0.1)
    assert not scheduler.has_prompts_for(0.2)
    while scheduler._live["B"].num_computed < 60:
        turn(scheduler)
    assert not scheduler.has_prompts_for(0.01)
    assert not new_scheduler().has_prompts_for(0.0)
