"""Messages between processes: msgspec structs, never pickle. Knows nothing of sockets.

Frontend -> engine: `Generate`, `Abort`. Engine -> frontend: `StepOutput`. Scheduler -> ranks of
its group: `ScheduledStep`. Each union below is what one socket carries.
"""

from typing import Any

import msgspec

# Below this a temperature means greedy, as in vLLM: dividing by it would overflow.
LEAST_TEMPERATURE = 1e-5


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. `Engine.generate` checks every field, so workers trust them."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logits_processors: dict[str, dict[str, Any]] = {}  # by name: what it is asked to do
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: list[int] = []  # in addition to the model's end-of-sequence ids
    ignore_eos: bool = False
    min_tokens: int = 0  # before these, no eos and no stop token can be chosen
    logprobs: int | None = None  # alternatives per token; 0: only the chosen token; None: none
    prompt_logprobs: int | None = None

    @property
    def takes_best(self) -> bool:
        """Whether each token is the best one of the logits as they are, and nothing else is asked
        of them."""
        return (
            self.temperature < LEAST_TEMPERATURE
            and not self.logit_bias
            and not self.logits_processors
            and self.presence_penalty == self.frequency_penalty == 0.0
            and self.repetition_penalty == 1.0
            and self.min_tokens == 0
            and self.logprobs is None
        )


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Continue `prompt_ids`. `request_id` is unique among live requests."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0  # waiting requests with the lowest value are computed first
    queue_timeout_s: float = 0.0  # time in the queue before its first step; 0: no limit


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Abort these requests. Unknown ids are ignored, and no answer is sent."""

    request_ids: list[str]


EngineInput = Generate | Abort


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities at one position, from the unmodified logits; `top_*` best first."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely token
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, array_like=True):
    """What one step adds to one request. Nothing follows an output with a finish_reason."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "error"; only in the last output
    stop_token_id: int | None = None  # the eos or stop token that ended it
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of positions 1.., once, all of them
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache; once
    error: str | None = None
    error_code: str | None = None  # a short word from which a frontend can tell more


class EngineStats(msgspec.Struct, array_like=True):
    """Gauges of one scheduler, and its counters since the start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_pages_total: int = 0
    kv_pages_free: int = 0  # free now
    kv_pages_cached: int = 0  # held only by the prefix cache: can be evicted
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0  # computed, not taken from the cache
    cached_tokens: int = 0
    generated_tokens: int = 0
    num_queue_timeouts: int = 0  # requests that waited too long


class ExpertLoads(msgspec.Struct, frozen=True, array_like=True):
    """Tokens routed to each expert, over all ranks. Lists are by layer with experts."""

    layers: list[int]  # indices in the model
    rows: list[list[int]]  # of each logical expert, since the start
    imbalance: list[float]  # recent rows of the busiest rank, divided by the mean of ranks


class StepOutput(msgspec.Struct, tag=True):
    """Everything that one engine step produced."""

    outputs: list[RequestOutput]
    stats: EngineStats | None = None  # now and then
    expert_loads: ExpertLoads | None = None  # rarely


class SlotInit(msgspec.Struct, frozen=True, array_like=True):
    """A request starts in a slot of the workers' state (again, after a preemption)."""

    slot: int
    token_ids: list[int]  # all known tokens: the prompt, and what was generated before
    num_prompt: int
    sampling: SamplingParams
    seed: int  # of this request's random numbers, 64 bits unsigned


class ScheduledStep(msgspec.Struct, frozen=True, array_like=True):
    """One step. The scheduler decides it, and every rank of its group runs it.

    Rows are sequences here: first `num_decodes` with one token each, then prefill chunks. Row i
    computes the positions `starts[i] .. starts[i] + lengths[i] - 1` of the tokens of slot
    `slots[i]`. If `samples[i]` is True, it also chooses the next token.
    """

    step: int
    inits: list[SlotInit]
    num_decodes: int
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    samples: list[bool]
    # Page-table entries set before this step: slot, column and page id of each.
    table_slots: list[int]
    table_columns: list[int]
    table_pages: list[int]
    num_logprob_rows: int = 0  # positions whose prompt logprobs are wanted, over all rows
    best_only: bool = False  # all that sample take the best token and need no logprobs
    decodes_follow: bool = False  # the next step may have decodes; False: it has none


class StepFacts(msgspec.Struct, frozen=True, array_like=True):
    """What the DP ranks agreed on for one step, the same on every rank; lists are by DP rank."""

    rows: list[int]  # tokens computed
    samples: list[int]  # rows that choose a token
    logprob_rows: list[int]  # prompt positions whose logprobs are wanted
    has_prefill: bool  # some DP rank computes a prompt
    best_only: bool = False  # `ScheduledStep.best_only` of every DP rank
    most_sequences: int = 0  # rows of the DP rank that has most: decodes and prompts


class AgreedStep(msgspec.Struct, frozen=True, array_like=True):
    """What every rank of an attention group runs: the step of its scheduler, which can be without
    rows, and what all groups agreed on."""

    scheduled: ScheduledStep
    facts: StepFacts


class StepResult(msgspec.Struct):
    """What a step returns to the scheduler, on the host.

    `token_ids` has one entry for each row of the step with `samples` set, in the order of rows.
    `logprobs` has only those that were asked for. `prompt_logprobs` maps a row to the entries of
    its chunk: one for the token after each position.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]  # by index into token_ids
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # by row of the step
