"""What every route needs: the context, metrics, admission, prompts to tokens.

Knows nothing of HTTP.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from core.errors import RequestError
from core.interfaces.frontend import EngineState, FrontendContext
from plugins.frontends._openai.limits import context_too_long
from plugins.frontends._openai.metrics import Metrics

# Shorter texts are tokenized in the event loop; longer ones in a thread, which the tokenizer
# leaves free to run beside it.
INLINE_CHARACTERS = 16 * 1024

_OWN_VARIABLES = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}

T = TypeVar("T")


class Service:
    """The frontend's context with what is computed from it."""

    def __init__(self, context: FrontendContext) -> None:
        self.context = context
        self.engine = context.engine
        self.tokenizer = context.tokenizer
        self.model = context.model
        self.config = context.config
        self.metrics = Metrics(context.engine, context.model.name, context.dropped_log_lines)
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
        if serving and self.engine.num_live + num_requests > self.max_live:
            raise RequestError(
                f"the server has {self.engine.num_live} requests and takes {self.max_live}; "
                "try again later",
                code="queue_full",
                status=429,
            )

    async def encode_prompt(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """The tokens of a prompt. Raises RequestError where it is sure to be too long."""
        least = len(text) // self.tokenizer.max_token_characters
        if least >= self.model.max_model_len:
            raise context_too_long(f"the prompt has at least {least} tokens", self.model, param)
        return await self.encode(text, add_special_tokens=add_special_tokens)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text of any length."""
        return await _maybe_in_thread(
            len(text),
            lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens),
        )

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: dict[str, Any],
    ) -> str:
        """The text of a conversation. Raises RequestError for messages that are not in form."""
        for name in _OWN_VARIABLES & variables.keys():
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs"
            )
        return await _maybe_in_thread(
            self.tokenizer.check_chat(messages, tools),
            lambda: self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            ),
        )


async def _maybe_in_thread(num_characters: int, work: Callable[[], T]) -> T:
    if num_characters <= INLINE_CHARACTERS:
        return work()
    return await asyncio.to_thread(work)
