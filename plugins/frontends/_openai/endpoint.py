"""What chat and completions have in common beyond any frontend's routes: events and usage."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from core.frontend.asgi import Call, ClientGone
from core.frontend.endpoint import Endpoint
from core.frontend.errors import code_of
from core.frontend.generation import Choice, OnPieces
from plugins.frontends._openai.fields import OF_GENERATION
from plugins.frontends._openai.streaming import DONE, EventStream

Body = TypeVar("Body", bound=msgspec.Struct)


class GenerationEndpoint(Endpoint[Body]):
    """A route that answers with events where they are asked for."""

    rules = OF_GENERATION
    text_fields = frozenset({"messages", "tools", "functions", "prompt"})

    async def stream(
        self,
        request_id: str,
        choices: Sequence[Choice],
        call: Call,
        events: EventStream,
        on_pieces: OnPieces,
        n: int,
    ) -> None:
        """Run the choices to their ends; `on_pieces` writes to `events`, this ends it."""
        try:
            async with events.kept_alive(call.record.begin_s):
                await self.run(request_id, choices, call, on_pieces)
        except ClientGone:
            raise
        except Exception as error:
            if not events.started:
                raise
            self.log_error(error)
            call.record.code = code_of(error)
            await events.fail(error)
            return
        total = usage(choices, n)
        await events.end((events.usage_event(total) if events.wants_usage else b"") + DONE)


def usage(choices: Sequence[Choice], n: int = 1) -> dict[str, Any]:
    """OpenAI's `usage` of the answers so far; `n` of them in a row share a prompt."""
    firsts = choices[::n]
    num_prompt_tokens = sum(len(choice.prompt_ids) for choice in firsts)
    completion = sum(choice.answer.num_tokens for choice in choices)
    cached = sum(choice.answer.num_cached_tokens for choice in firsts)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
