"""What every route needs: the context, metrics, admission, prompts to tokens.

Knows nothing of HTTP.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from core.errors import RequestError
from core.interfaces.frontend import EngineState, FrontendContext
from plugins.frontends._openai.limits import MAX_MESSAGES, ROLES, context_too_long
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
        self.metrics = Metrics(context.engine, context.model.name)
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
        size = check_messages(messages)
        for name in _OWN_VARIABLES & variables.keys():
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs"
            )
        return await _maybe_in_thread(
            size,
            lambda: self.tokenizer.apply_chat_template(
                [_parse_tool_calls(message) for message in messages],
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


def check_messages(messages: list[dict[str, Any]]) -> int:
    """Raise RequestError unless all have a known role and text; returns the size of the text."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(
            f"messages has {len(messages)} entries; allowed: 1 to {MAX_MESSAGES}", param="messages"
        )
    size = 0
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", param=where)
        size += _content_size(message, where)
    return size


def _content_size(message: dict[str, Any], where: str) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    if content is None and message["role"] == "assistant":
        return 0  # it may consist of tool calls
    if not isinstance(content, list):
        raise RequestError(
            f"{where}.content must be text or a list of parts", param=f"{where}.content"
        )
    size = 0
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(
                f"{where}.content may hold parts of type text only: this model reads no others",
                param=f"{where}.content",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.content: text is missing", param=f"{where}.content")
        size += len(part["text"])
    return size


def _parse_tool_calls(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its tool calls' arguments as objects: OpenAI has them as JSON text,
    templates want to format them themselves."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parse_arguments(call) for call in calls]}


def _parse_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call  # text is what the model once wrote; the template gets it as it is
    return {**call, "function": {**function, "arguments": arguments}}
