"""The frame of a route that takes a JSON body: decode, handle, and turn errors into responses.

Knows nothing of any route's contents.
"""

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from core.errors import RequestError, WorkerDied
from core.interfaces.text import SplitBody
from plugins.frontends._openai.answer import Piece
from plugins.frontends._openai.asgi import (
    ClientGone,
    Receive,
    Scope,
    Send,
    check_content_type,
    read_body,
    send_error,
    watch_disconnect,
)
from plugins.frontends._openai.decoding import (
    MAX_FIELD_BYTES,
    MAX_NAMED_BYTES,
    Decoded,
    decode,
)
from plugins.frontends._openai.errors import as_request_error
from plugins.frontends._openai.fields import HEADER, REFUSED, UNNAMED, header_value
from plugins.frontends._openai.generation import Choice, Generation, OnPieces
from plugins.frontends._openai.protocol import WITHOUT_EFFECT
from plugins.frontends._openai.service import Service
from plugins.frontends._openai.streaming import DONE, EventStream

# A body up to this size takes a few milliseconds to decode, whatever it consists of.
LARGE_BODY_BYTES = 1024 * 1024
TEXT_FIELDS = frozenset({"messages", "tools", "functions", "prompt", "tokens"})
CLIENT_CLOSED = "499"  # as web servers log a request whose client went away
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
        responses = self.service.metrics.responses
        try:
            check_content_type(scope)
            config = self.service.config
            raw = await read_body(scope, receive, config.max_body_bytes)
            body, ignored = await self._decode(raw)
            if ignored:
                self.service.metrics.ignore(ignored)
                send = naming_ignored(send, ignored)
            await self.handle(body, receive, send)
        except ClientGone:
            responses[self.route, CLIENT_CLOSED] += 1
        except Exception as error:
            self._log(error)
            responses[self.route, str(as_request_error(error).status)] += 1
            await send_error(send, error)
        else:
            responses[self.route, "200"] += 1

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
    async def handle(self, body: Body, receive: Receive, send: Send) -> None:
        """Answer. May raise any exception before its first write, and none after."""

    async def collect(
        self, request_id: str, choices: Sequence[Choice], receive: Receive
    ) -> list[list[Piece]]:
        """Run the choices to their ends; returns the pieces of each."""
        seen: list[list[Piece]] = [[] for _ in choices]

        async def on_pieces(choice: Choice, pieces: list[Piece]) -> None:
            seen[choice.index] += pieces

        await self._run(request_id, choices, receive, on_pieces)
        return seen

    async def stream(
        self,
        request_id: str,
        choices: Sequence[Choice],
        receive: Receive,
        events: EventStream,
        on_pieces: OnPieces,
        n: int,
    ) -> None:
        """Run the choices to their ends; `on_pieces` writes to `events`, this ends it."""
        try:
            await self._run(request_id, choices, receive, on_pieces)
        except ClientGone:
            raise
        except Exception as error:
            if not events.started:
                raise
            self._log(error)
            await events.fail(error)
            return
        total = usage(choices, n)
        await events.end((events.usage_event(total) if events.wants_usage else b"") + DONE)

    async def _run(
        self, request_id: str, choices: Sequence[Choice], receive: Receive, on_pieces: OnPieces
    ) -> None:
        try:
            with (
                Generation(self.service, request_id, choices) as generation,
                watch_disconnect(receive, generation.disconnect),
            ):
                await generation.run(on_pieces)
        except RequestError as error:
            if error.param == "prompt_ids":  # as the engine calls it
                error.param = self.prompt_param
            raise
        if generation.disconnected:
            raise ClientGone

    def _log(self, error: Exception) -> None:
        """Errors that are not meant for clients belong in the log."""
        if not isinstance(error, RequestError | WorkerDied):
            log.error("%s failed", self.route, exc_info=error)


def naming_ignored(send: Send, names: Sequence[str]) -> Send:
    """`send`, with a header in the response that names the fields without effect."""

    async def named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (HEADER, header_value(names))]}
        await send(message)

    return named


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
