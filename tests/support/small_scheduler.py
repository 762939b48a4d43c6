"""A scheduler of few pages, and what its steps hold. It is checked after every move."""

from typing import Any

from core.engine.schedule.scheduler import Scheduler
from core.interfaces.messages import (
    Generate,
    RequestOutput,
    SamplingParams,
    ScheduledStep,
    StepResult,
)
from core.settings.config import EngineConfig

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


def plan(scheduler: Scheduler) -> ScheduledStep:
    planned = scheduler.next_batch()
    assert planned is not None
    scheduler.check()
    return planned


def commit(scheduler: Scheduler, planned: ScheduledStep, *token_ids: int) -> list[RequestOutput]:
    outputs = scheduler.commit(planned, StepResult(list(token_ids), {}, {}))
    scheduler.check()
    return outputs


def rows(planned: ScheduledStep) -> list[tuple[int, int, int, bool]]:
    """(slot, start, length, samples) of each row."""
    return list(zip(planned.slots, planned.starts, planned.lengths, planned.samples, strict=True))


def table(planned: ScheduledStep) -> dict[tuple[int, int], int]:
    entries = zip(planned.table_slots, planned.table_columns, strict=True)
    return dict(zip(entries, planned.table_pages, strict=True))
