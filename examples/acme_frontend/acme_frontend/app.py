"""POST /generate: a prompt in, its continuation out as plain text, as it is made.

Knows nothing of keys, limits, metrics or processes: those are the same for every frontend.
"""

import msgspec
from starlette.applications import Starlette
from starlette.routing import Route

from acme_frontend import AcmeOptions
from core.frontend.answer import Piece
from core.frontend.asgi import Call
from core.frontend.endpoint import Endpoint, new_id
from core.frontend.fields import SamplingFields
from core.frontend.generation import Choice
from core.frontend.service import Service
from core.interfaces.frontend import FrontendContext

HEADERS = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-cache")]


class GenerateRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """A body: what is to be continued, and the fields of sampling."""

    prompt: msgspec.Raw  # a text or token ids, of any length that the model takes


class Generate(Endpoint[GenerateRequest]):
    """The route."""

    route = "/generate"
    body_type = GenerateRequest

    def __init__(self, service: Service, options: AcmeOptions) -> None:
        super().__init__(service)
        self._default_max_tokens = options.default_max_tokens

    async def handle(self, body: GenerateRequest, call: Call) -> None:
        choices = await self.service.choices(
            body, bytes(body.prompt), default_max_tokens=self._default_max_tokens
        )

        async def write(choice: Choice, pieces: list[Piece]) -> None:
            text = "".join(piece.text for piece in pieces).encode()
            if not call.record.status:  # what fails before the first token has a status of its own
                await call.send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            more = choice.answer.finish_reason is None
            await call.send({"type": "http.response.body", "body": text, "more_body": more})

        await self.run(new_id("acme"), choices, call, write)


def create_app(options: AcmeOptions, context: FrontendContext) -> Starlette:
    """The factory: an ASGI application."""
    generate = Generate(Service(context), options)
    return Starlette(routes=[Route(generate.route, generate, methods=["POST"])])
