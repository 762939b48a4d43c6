"""The frame of a route that takes a JSON body: decode, handle, and turn errors into responses.

Knows nothing of any route's contents.
"""

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from core.errors import RequestError, WorkerDied
from core.frontend.answer import Piece
from core.frontend.asgi import (
    Call,
    ClientGone,
    Receive,
    Scope,
    Send,
    check_content_type,
    read_body,
    send_error,
    watch_disconnect,
)
from core.frontend.errors import code_of
from core.interfaces.http import record_of
from core.interfaces.text import SplitBody
from plugins.frontends._openai.decoding import (
    MAX_FIELD_BYTES,
    MAX_NAMED_BYTES,
    Decoded,
    decode,
)
from plugins.frontends._openai.fields import HEADER, REFUSED, UNNAMED, header_value
from plugins.frontends._openai.generation import Choice, Generation, OnPieces
from plugins.frontends._openai.protocol import WITHOUT_EFFECT
from plugins.frontends._openai.service import Service
from plugins.frontends._openai.streaming import DONE, EventStream

# A body up to this size takes a few milliseconds to decode, whatever it consists of.
LARGE_BODY_BYTES = 1024 * 1024
TEXT_FIELDS = frozenset({"messages", "tools", "functions", "prompt", "tokens"})
log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)


class Endpoint(ABC, Generic[Body]):
    """An ASGI application for one route. Subclasses set `route` and `body_type`."""

    route: str
    body_type: type[Body]
    prompt_param = "prompt"  # the field that prompts come from

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(receive, send, record_of(scope))
        call.record.route = self.route
        try:
            check_content_type(scope)
            # Not named: up to 8 MiB, which nobody needs while the answer is made.
            body, ignored = await self._decode(await read_body(receive))
            if ignored:
                self.service.metrics.ignore(ignored)
                call.record.headers.append((HEADER, header_value(ignored)))
            await self.handle(body, call)
        except ClientGone:
            return  # there is nobody to answer, or it has been done
        except Exception as error:
            self._log(error)
            call.record.code = code_of(error)
            await send_error(send, error)

    async def _decode(self, raw: bytes) -> Decoded[Body]:
        """The body as a struct. A large one is taken apart outside the event loop: the fields that
        hold text stay as they came, and what is left is small."""
        strict = self.service.config.strict_fields
        if len(raw) <= LARGE_BODY_BYTES:
            return decode(raw, self.body_type, strict=strict)
        await asyncio.sleep(0)  # each step copies the body: others get their turn in between
        names = self.body_type.__struct_fields__
        parts = await self.service.context.text.split(
            SplitBody(
                body=raw,
                text_fields=[name for name in names if name in TEXT_FIELDS],
                known_fields=[*names, *REFUSED],
                ignored_fields=list(WITHOUT_EFFECT),
                max_field_bytes=MAX_FIELD_BYTES,
                max_unknown_bytes=MAX_NAMED_BYTES,
                unnamed=UNNAMED,
            )
        )
        await asyncio.sleep(0)
        body, ignored = decode(parts.rest, self.body_type, strict=strict)
        for name, text in parts.texts.items():
            setattr(body, name, msgspec.Raw(text))
        await asyncio.sleep(0)
        return Decoded(body, ignored)

    @abstractmethod
    async def handle(self, body: Body, call: Call) -> None:
        """Answer. May raise any exception before its first write, and none after."""

    async def collect(
        self, request_id: str, choices: Sequence[Choice], call: Call
    ) -> list[list[Piece]]:
        """Run the choices to their ends; returns the pieces of each."""
        seen: list[list[Piece]] = [[] for _ in choices]

        async def on_pieces(choice: Choice, pieces: list[Piece]) -> None:
            seen[choice.index] += pieces

        await self._run(request_id, choices, call, on_pieces)
        return seen

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
                await self._run(request_id, choices, call, on_pieces)
        except ClientGone:
            raise
        except Exception as error:
            if not events.started:
                raise
            self._log(error)
            call.record.code = code_of(error)
            await events.fail(error)
            return
        total = usage(choices, n)
        await events.end((events.usage_event(total) if events.wants_usage else b"") + DONE)

    async def _run(
        self, request_id: str, choices: Sequence[Choice], call: Call, on_pieces: OnPieces
    ) -> None:
        generation = Generation(self.service, request_id, choices)
        try:
            with generation, watch_disconnect(call.receive, generation.disconnect):
                await generation.run(on_pieces)
        except RequestError as error:
            if error.param == "prompt_ids":  # as the engine calls it
                error.param = self.prompt_param
            raise
        finally:
            generation.tell(call.record)
        if generation.disconnected:
            raise ClientGone

    def _log(self, error: Exception) -> None:
        """Errors that are not meant for clients belong in the log."""
        if not isinstance(error, RequestError | WorkerDied):
            log.error("%s failed", self.route, exc_info=error)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


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
