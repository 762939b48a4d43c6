"""The frame of a route that takes a JSON body: decode, handle, and turn errors into responses.

Knows nothing of any route's contents.
"""

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

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
from core.frontend.decoding import (
    MAX_FIELD_BYTES,
    MAX_NAMED_BYTES,
    NO_RULES,
    Decoded,
    decode,
)
from core.frontend.errors import code_of
from core.frontend.fields import HEADER, UNNAMED, FieldRules, header_value
from core.frontend.generation import Choice, Generation, OnPieces
from core.frontend.service import Service
from core.interfaces.http import record_of
from core.interfaces.text import SplitBody

# A body up to this size takes a few milliseconds to decode, whatever it consists of.
LARGE_BODY_BYTES = 1024 * 1024
log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)


class Endpoint(ABC, Generic[Body]):
    """An ASGI application for one route. Subclasses set `route` and `body_type`, fill `handle`, and
    have these made for them: the body is read, checked and decoded, errors become answers, answers
    run and are aborted where the client goes away.
    """

    route: str  # labels a metric
    body_type: type[Body]  # forbids unknown fields; what may be long in it is msgspec.Raw
    rules: FieldRules = NO_RULES  # for fields beside those
    text_fields: frozenset[str] = frozenset({"prompt"})  # of the Raw ones; may be of any length
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
            call.record.code = code_of(error)
            if call.record.status:  # the answer has begun: the server cuts and logs it
                raise
            self.log_error(error)
            await send_error(send, error)

    async def _decode(self, raw: bytes) -> Decoded[Body]:
        """The body as a struct. A large one is taken apart outside the event loop: the fields that
        hold text stay as they came, and what is left is small."""
        strict = self.service.config.strict_fields
        if len(raw) <= LARGE_BODY_BYTES:
            return decode(raw, self.body_type, self.rules, strict=strict)
        await asyncio.sleep(0)  # each step copies the body: others get their turn in between
        names = self.body_type.__struct_fields__
        parts = await self.service.context.text.split(
            SplitBody(
                body=raw,
                text_fields=[name for name in names if name in self.text_fields],
                known_fields=[*names, *self.rules.refused],
                ignored_fields=list(self.rules.without_effect),
                max_field_bytes=MAX_FIELD_BYTES,
                max_unknown_bytes=MAX_NAMED_BYTES,
                unnamed=UNNAMED,
            )
        )
        await asyncio.sleep(0)
        body, ignored = decode(parts.rest, self.body_type, self.rules, strict=strict)
        for name, text in parts.texts.items():
            setattr(body, name, msgspec.Raw(text))
        await asyncio.sleep(0)
        return Decoded(body, ignored)

    @abstractmethod
    async def handle(self, body: Body, call: Call) -> None:
        """Answer. What it raises before its first write is answered; after it, the connection is
        cut, so that the client sees that something is missing."""

    async def collect(
        self, request_id: str, choices: Sequence[Choice], call: Call
    ) -> list[list[Piece]]:
        """Run the choices to their ends; returns the pieces of each."""
        seen: list[list[Piece]] = [[] for _ in choices]

        async def on_pieces(choice: Choice, pieces: list[Piece]) -> None:
            seen[choice.index] += pieces

        await self.run(request_id, choices, call, on_pieces)
        return seen

    async def run(
        self, request_id: str, choices: Sequence[Choice], call: Call, on_pieces: OnPieces
    ) -> None:
        """Run the choices to their ends, giving out what becomes visible (`Generation.run`)."""
        generation = Generation(self.service.context, request_id, choices)
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

    def log_error(self, error: Exception) -> None:
        """Errors that are not meant for clients belong in the log."""
        if not isinstance(error, RequestError | WorkerDied):
            log.error("%s failed", self.route, exc_info=error)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
