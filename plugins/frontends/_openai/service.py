"""What every route needs: the context, metrics, admission, prompts to tokens.

Knows nothing of HTTP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import RequestError
from core.frontend.limits import check_prompt_length, context_too_long
from core.interfaces.frontend import EngineState, FrontendContext
from core.interfaces.text import ChatText, Prompt, PromptTexts


class Service:
    """The frontend's context with what is computed from it."""

    def __init__(self, context: FrontendContext) -> None:
        self.context = context
        self.engine = context.engine
        self.tokenizer = context.tokenizer
        self.model = context.model
        self.config = context.config
        self.metrics = context.metrics
        self._num_coming = 0  # requests that the engine is yet to hear of
        self.max_live = context.max_running_requests + context.config.max_queued_requests

    def admit(self, num_requests: int) -> None:
        """Raise RequestError 429 where that many more requests don't fit into the queue.

        An engine that accepts nothing at all answers for itself, with 503, in `generate`.
        """
        if num_requests > self.max_live:
            raise RequestError(
                f"this asks for {num_requests} answers at once; allowed: 1 to {self.max_live}",
                param="n",
                code="out_of_range",
            )
        serving = self.engine.state is EngineState.SERVING
        num_live = self.engine.num_live + self._num_coming
        if serving and num_live + num_requests > self.max_live:
            raise RequestError(
                f"the server has {num_live} requests and takes {self.max_live}; try again later",
                code="queue_full",
                status=429,
            )

    @contextmanager
    def submitting(self, num_requests: int) -> Iterator[Callable[[], None]]:
        """Counts admitted requests until each is submitted: the value is called after each."""
        left = num_requests
        self._num_coming += num_requests

        def submitted() -> None:
            nonlocal left
            left -= 1
            self._num_coming -= 1

        try:
            yield submitted
        finally:
            self._num_coming -= left

    @contextmanager
    def tokenizing(self, num_requests: int) -> Iterator[None]:
        """Around the work that comes before so many requests: refuses it as `admit` does, and
        counts them meanwhile, so that the queue's limit bounds this work too."""
        self.admit(num_requests)
        self._num_coming += num_requests
        try:
            yield
        finally:
            self._num_coming -= num_requests

    async def chat_ids(self, job: ChatText) -> list[int]:
        """The tokens of a conversation, of a length that the model takes."""
        return self._checked(await self.context.text.chat(job), "messages").ids

    async def prompts(self, job: PromptTexts) -> list[Prompt]:
        """The prompts of a body, each of a length that the model takes."""
        found = await self.context.text.prompts(job)
        return [self._checked(prompt, "prompt") for prompt in found]

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        if prompt.at_least:
            what = f"the prompt has at least {prompt.num_tokens} tokens"
            raise context_too_long(what, self.model, param)
        check_prompt_length(prompt.num_tokens, self.model, param)
        return prompt
