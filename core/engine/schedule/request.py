"""One request's state in the scheduler. Knows nothing of pools, plans or other requests."""

import enum
from dataclasses import dataclass, field

from core.engine.schedule.prefix_cache import Node
from core.interfaces.messages import SamplingParams, TokenLogprobs


class State(enum.Enum):
    """Where a request stands. Only a request in the middle three holds a slot and pages."""

    WAITING = "waiting"  # new, or preempted
    PREFILLING = "prefilling"  # not all known tokens are computed by planned steps
    DECODING = "decoding"  # one token a step
    ENDING = "ending"  # its last step is planned; nothing is left to decide
    ENDED = "ended"  # finished or aborted; results still to come are ignored


@dataclass(slots=True, eq=False)
class Request:
    """Filled when it is admitted (first part), then by the scheduler alone."""

    request_id: str
    sampling: SamplingParams
    tokens: list[int]  # the prompt and the committed tokens
    num_prompt: int
    seed: int  # 64 bits, the same over preemptions
    arrival: int  # order of arrival: the lower, the later preempted
    stop_ids: frozenset[int]  # tokens that end it: eos (unless ignored) and its own
    max_tokens_total: int  # prompt included: max_tokens, max_model_len, size of the pool

    priority: int = 0  # the lower, the sooner it is computed and the later preempted
    deadline_s: float | None = None  # to get out of the queue for the first time; None: for ever

    state: State = State.WAITING
    ended: bool = False  # state is ENDED
    slot: int = -1  # -1: none
    pages: list[int] = field(default_factory=list)  # by column of the page table
    # Its lock: the first `node.depth` pages belong to the prefix cache. None: no slot.
    node: Node | None = None
    num_computed: int = 0  # positions computed by planned steps; the decode set's while DECODING
    num_cached: int | None = None  # prompt tokens found in the cache; None: never ran
    answered: bool = False  # the first output was sent
    prompt_logprobs: list[TokenLogprobs] | None = None  # collected so far; None: none wanted
    planned_step: int = 0  # the last step that computes a part of its prompt

    # Of the waiting queue.
    waiting_tokens: int = 0  # to compute, when it came to wait
    overtaken_pages: int = 0  # given to later requests while there were too few for it

    # Of the decode set.
    row: int = -1
    page_due: int = -1  # step that needs the next page
    last_step: int = -1  # step that yields its last token, unless it stops before

    @property
    def num_known(self) -> int:
        """Tokens known on the host."""
        return len(self.tokens)

    @property
    def has_run(self) -> bool:
        """Whether it was in a step; it may wait again."""
        return self.num_cached is not None

    @property
    def tokens_left(self) -> int:
        """Known tokens that are not computed; of one that waits about so many."""
        return self.waiting_tokens if self.slot < 0 else self.num_known - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None

    @property
    def uses_cached_prefix(self) -> bool:
        """False while prompt logprobs are still owed: they need every position computed."""
        return self.prompt_logprobs is None or self.answered

    def stops_on(self, token_id: int) -> bool:
        """Whether the token just appended ends the answer, as it may after min_tokens others."""
        num_before = len(self.tokens) - self.num_prompt - 1
        return token_id in self.stop_ids and num_before >= self.sampling.min_tokens
