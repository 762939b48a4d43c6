"""Steps of made-up requests: what they cost here, and those that warm a rank up."""

import time

import torch

from core.engine.build.context import RankContext
from core.engine.run.executor import StepExecutor
from core.engine.run.loop import warm_up
from core.engine.schedule.mixed_steps import mixed_tokens
from core.engine.schedule.pace import Pace, Timed, measure_pace
from core.engine.step.profile_steps import most_prompt_tokens
from core.interfaces.messages import SamplingParams, ScheduledStep, SlotInit
from core.settings.config import AppConfig


def pace_of(
    config: AppConfig, context: RankContext, steps: StepExecutor, max_model_len: int
) -> Pace:
    """What steps cost, agreed on by all ranks: the slowest one's time is everybody's."""
    return measure_pace(
        _timed(context, steps),
        step_tokens=most_prompt_tokens(config.engine, max_model_len),
        context_tokens=max_model_len - 1,
    )


def mixed_tokens_of(
    config: AppConfig, context: RankContext, steps: StepExecutor, max_model_len: int
) -> int | None:
    """Most prompt tokens beside decodes while few prompts wait; None: a CPU's steps are cut to a
    time instead."""
    if context.device.type == "cpu":
        return None
    if config.engine.mixed_prefill_tokens is not None:
        return config.engine.mixed_prefill_tokens
    most = most_prompt_tokens(config.engine, max_model_len)
    return mixed_tokens(_timed(context, steps), min(most, max_model_len - 1), most)


def _timed(context: RankContext, steps: StepExecutor) -> Timed:
    """Runs a step of made-up requests; the seconds that the slowest rank took."""
    world, num_dp = context.comms.axes["world"], context.plan.axis_size("dp")

    def timed(scheduled: ScheduledStep) -> float:
        begin = time.perf_counter()
        warm_up(steps, [scheduled], num_dp)
        seconds = time.perf_counter() - begin
        mine = torch.tensor([seconds], dtype=torch.float64, device=context.device)
        return float(world.all_gather(mine, 0).max())

    return timed


def warm_up_plans(num_tokens: int) -> list[ScheduledStep]:
    """A prefill and a decode step of one made-up request, on the scratch page."""
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    init = SlotInit(0, [0] * num_tokens, num_tokens, greedy, 0)
    prefill = ScheduledStep(0, [init], 0, [0], [0], [num_tokens], [True], [0], [0], [0])
    decode = ScheduledStep(0, [], 1, [0], [num_tokens - 1], [1], [True], [], [], [])
    return [prefill, decode]
