"""What becomes of a message that asks for tokens: a request with all its limits, or a refusal."""

import random
from collections.abc import Callable, Sequence

from core.engine.schedule.request import Request
from core.interfaces.messages import Generate
from core.settings.config import EngineConfig

_SEED_MASK = (1 << 64) - 1


class Intake:
    """Of one DP rank. Numbers requests by arrival and draws their seeds."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        dp_rank: int,
        max_model_len: int,
        pool_tokens: int,
        eos_ids: Sequence[int],
        clock: Callable[[], float],
    ) -> None:
        self._max_model_len = max_model_len
        self._pool_tokens = pool_tokens
        self._eos_ids = frozenset(eos_ids)
        self._clock = clock
        # Each DP rank draws other seeds, lest the same prompt get the same answer on all.
        self._rng = random.Random(config.seed if dp_rank == 0 else f"{config.seed}/{dp_rank}")
        self._num_arrivals = 0

    def problem(self, num_prompt: int) -> str | None:
        """Why a prompt can't ever run, or None."""
        if num_prompt == 0:
            return "the prompt has no tokens; send at least one"
        for limit, what, key in (
            (self._max_model_len, "model's context", "model.max_model_len"),
            (self._pool_tokens, "KV cache", "engine.kv_cache_tokens"),
        ):
            if num_prompt + 1 > limit:
                return (
                    f"the prompt has {num_prompt} tokens and needs room for one more, but the "
                    f"{what} has {limit}; send at most {limit - 1}, or raise {key}"
                )
        return None

    def request(self, message: Generate) -> Request:
        """A new request, which waits."""
        sampling = message.sampling
        stop_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        if sampling.stop_token_ids:
            stop_ids = stop_ids.union(sampling.stop_token_ids)
        num_prompt = len(message.prompt_ids)
        drawn = self._rng.getrandbits(64)
        self._num_arrivals += 1
        return Request(
            request_id=message.request_id,
            sampling=sampling,
            tokens=list(message.prompt_ids),
            num_prompt=num_prompt,
            seed=drawn if sampling.seed is None else sampling.seed & _SEED_MASK,
            arrival=self._num_arrivals,
            stop_ids=stop_ids,
            # The last token of an answer is never computed: a full pool allows one more.
            max_tokens_total=min(
                num_prompt + sampling.max_tokens, self._max_model_len, self._pool_tokens + 1
            ),
            prompt_logprobs=None if sampling.prompt_logprobs is None else [],
            priority=message.priority,
            deadline_s=self._clock() + message.queue_timeout_s if message.queue_timeout_s else None,
        )
