"""A step in the making, and what its results need of it later. Decides nothing."""

from dataclasses import dataclass, field

from core.engine.schedule.request import Request
from core.interfaces.messages import ScheduledStep, SlotInit


@dataclass(slots=True)
class StepBuilder:
    """A step in the making, and what `commit` needs of it later."""

    step: int
    num_decodes: int
    requests: list[Request]  # by row
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    samples: list[bool]
    sampled: list[Request]  # by index into the result's token_ids
    # Requests whose last row this is, with its index into `sampled`; -1: it samples nothing.
    last: list[tuple[Request, int]]
    inits: list[SlotInit] = field(default_factory=list)
    table_slots: list[int] = field(default_factory=list)
    table_columns: list[int] = field(default_factory=list)
    table_pages: list[int] = field(default_factory=list)
    num_logprob_rows: int = 0
    best_only: bool = False

    def set_page(self, request: Request, column: int) -> None:
        self.table_slots.append(request.slot)
        self.table_columns.append(column)
        self.table_pages.append(request.pages[column])

    def build(self, *, decodes_follow: bool) -> ScheduledStep:
        """What runners are told. Its lists are this builder's, which never change from here on."""
        return ScheduledStep(
            step=self.step,
            inits=self.inits,
            num_decodes=self.num_decodes,
            slots=self.slots,
            starts=self.starts,
            lengths=self.lengths,
            samples=self.samples,
            table_slots=self.table_slots,
            table_columns=self.table_columns,
            table_pages=self.table_pages,
            num_logprob_rows=self.num_logprob_rows,
            best_only=self.best_only,
            decodes_follow=decodes_follow,
        )
