"""A runner without a model, for scheduler tests: it does what the plan says and checks that the
plan made sense.

Its "KV" of a position is a hash of all tokens up to there, stored by (page, offset). Before it
samples, it demands that every earlier position's page holds exactly that hash, which catches
pages reused too early, shared wrongly, or announced in the wrong place.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from core.interfaces.messages import (
    AgreedStep,
    SamplingParams,
    ScheduledStep,
    SlotInit,
    StepResult,
    TokenLogprobs,
)

VOCAB_SIZE = 23


def histories(tokens: Sequence[int]) -> list[int]:
    """For each position a hash of the tokens up to and including it."""
    result, history = [], 0
    for token in tokens:
        history = hash((history, token))
        result.append(history)
    return result


def next_token(history: int) -> int:
    """What the fake model says after a history."""
    return (history >> 7) % VOCAB_SIZE


@dataclass
class Expected:
    """The whole answer to a request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_token_id: int | None = None


def expected_answer(
    prompt: Sequence[int], sampling: SamplingParams, *, eos_ids: Collection[int], max_len: int
) -> Expected:
    """Generate one token after the other, as if no other request existed.

    `max_len`: most tokens of prompt and answer together.
    """
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_ids))
    tokens = list(prompt)
    answer = Expected()
    while len(answer.token_ids) < sampling.max_tokens and len(tokens) < max_len:
        token = next_token(histories(tokens)[-1])
        may_stop = len(answer.token_ids) >= sampling.min_tokens
        tokens.append(token)
        answer.token_ids.append(token)
        if may_stop and token in stops:
            answer.finish_reason = "stop"
            answer.stop_token_id = token
            break
    return answer


class FakeRunner:
    """Runs plans at once, in the order of the calls."""

    def __init__(self, page_size: int, num_pages: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.inits: dict[int, SlotInit] = {}
        self.tokens: dict[int, list[int]] = {}
        self.table: dict[tuple[int, int], int] = {}
        self.kv: dict[tuple[int, int], int] = {}

    def run(self, plan: ScheduledStep) -> StepResult:
        self._update(plan)
        rows = range(len(plan.slots))
        assert len(plan.starts) == len(plan.lengths) == len(plan.samples) == len(rows)
        assert len(set(plan.slots)) == len(rows), "two rows of one slot"
        assert all(plan.lengths[row] == 1 and plan.samples[row] for row in rows[: plan.num_decodes])
        for row in rows:  # before anything is written: a step can't read what it computes elsewhere
            self._read(plan.slots[row], plan.starts[row])
        written: set[tuple[int, int]] = set()
        for row in rows:
            written |= self._write(plan, row, written)
        result = StepResult(token_ids=[], logprobs={}, prompt_logprobs={})
        for row in rows:
            self._read(plan.slots[row], plan.starts[row] + plan.lengths[row])
            self._sample(plan, row, result)
        num_logprobs = sum(len(entries) for entries in result.prompt_logprobs.values())
        assert num_logprobs == plan.num_logprob_rows, "counts other prompt positions"
        return result

    def run_agreed(self, step: AgreedStep, dp_rank: int) -> StepResult:
        """Run this DP rank's part of a step all agreed on; it has no rows in an idle plan."""
        plan, facts = step.scheduled, step.facts
        assert any(facts.rows), "a step nobody needs"
        assert facts.rows[dp_rank] == sum(plan.lengths)
        assert facts.samples[dp_rank] == sum(plan.samples)
        assert facts.logprob_rows[dp_rank] == plan.num_logprob_rows
        assert facts.has_prefill or plan.num_decodes == len(plan.slots)
        return self.run(plan)

    def _update(self, plan: ScheduledStep) -> None:
        for init in plan.inits:
            self.inits[init.slot] = init
            self.tokens[init.slot] = list(init.token_ids)
        entries = list(zip(plan.table_slots, plan.table_columns, strict=True))
        assert len(set(entries)) == len(entries), "a table entry is set twice in one step"
        assert all(0 < page < self.num_pages for page in plan.table_pages)
        self.table |= zip(entries, plan.table_pages, strict=True)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        column, offset = divmod(position, self.page_size)
        return self.table[slot, column], offset

    def _write(
        self, plan: ScheduledStep, row: int, written: set[tuple[int, int]]
    ) -> set[tuple[int, int]]:
        slot, start = plan.slots[row], plan.starts[row]
        end = start + plan.lengths[row]
        assert start < end <= len(self.tokens[slot]), "computes a token that is not known"
        places = {self._place(slot, position) for position in range(start, end)}
        assert not places & written, "two rows of one step write to the same place"
        for position, history in list(enumerate(histories(self.tokens[slot])))[start:end]:
            self.kv[self._place(slot, position)] = history
        return places

    def _read(self, slot: int, end: int) -> None:
        for position, history in enumerate(histories(self.tokens[slot][:end])):
            found = self.kv.get(self._place(slot, position))
            assert found == history, f"slot {slot} reads wrong KV at position {position}"

    def _sample(self, plan: ScheduledStep, row: int, result: StepResult) -> None:
        slot, start = plan.slots[row], plan.starts[row]
        end = start + plan.lengths[row]
        tokens, init = self.tokens[slot], self.inits[slot]
        if init.sampling.prompt_logprobs is not None and row >= plan.num_decodes:
            result.prompt_logprobs[row] = [
                _logprobs(tokens[position], position)
                for position in range(start + 1, end + 1)
                if position < init.num_prompt
            ]
        if plan.samples[row]:
            assert end == len(tokens), "samples where the next token is known"
            token = next_token(histories(tokens)[-1])
            tokens.append(token)
            if init.sampling.logprobs is not None:
                result.logprobs[len(result.token_ids)] = _logprobs(token, end)
            result.token_ids.append(token)


def _logprobs(token: int, position: int) -> TokenLogprobs:
    """Recognisable values: the position is the rank."""
    return TokenLogprobs(token, -1.0, position, [], [])
