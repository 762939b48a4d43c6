"""The routes, and the small ones among them. `create_app` is the plugin's factory.

Knows nothing of how the engine is reached.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.errors import RequestError
from core.frontend.asgi import App, Call, Receive, Scope, Send, send_json
from core.frontend.endpoint import Endpoint
from core.frontend.errors import as_request_error, code_of, error_body, error_headers
from core.frontend.service import Service
from core.interfaces.frontend import FrontendContext
from core.interfaces.http import record_of
from core.interfaces.text import MAX_TOKENIZED, ChatText, IdsToText, PromptTexts, TokenList
from core.plugin.hookspecs import NoOptions
from plugins.frontends._openai.chat import ChatCompletions, chat_text
from plugins.frontends._openai.completions import Completions
from plugins.frontends._openai.fields import ALL
from plugins.frontends._openai.limits import check_model
from plugins.frontends._openai.protocol import NULL, DetokenizeRequest, TokenizeRequest


def create_app(options: NoOptions, context: FrontendContext) -> App:
    """An ASGI application that serves OpenAI's API."""
    service = Service(context)
    small = _SmallRoutes(service)
    post = ["POST"]
    app = Starlette(
        routes=[
            _named_route("/server_info", small.server_info),
            _named_route("/expert_load", small.expert_load),
            _named_route("/v1/models", small.models),
            _named_route("/v1/models/{name:path}", small.model),
            Route("/v1/chat/completions", ChatCompletions(service), methods=post),
            Route("/v1/completions", Completions(service), methods=post),
            Route("/tokenize", Tokenize(service), methods=post),
            Route("/detokenize", Detokenize(service), methods=post),
        ],
        exception_handlers={HTTPException: _on_http_exception, Exception: _on_exception},
    )
    app.state.own_routes = context.own_routes
    app.router.redirect_slashes = False
    return _forgiving_slashes(app)


def _named_route(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route whose requests are told by its name."""

    async def named(request: Request) -> Response:
        record_of(request.scope).route = path
        return await handler(request)

    return Route(path, named)


def _forgiving_slashes(app: App) -> App:
    """Slashes too many, at the end or in a row, mean nothing: addresses are put together by hand.
    A redirect would make some clients send a GET."""

    async def forgiving(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := _SLASHES.sub("/", scope["path"])) != "/":
            scope = {**scope, "path": path.removesuffix("/")}
        await app(scope, receive, send)

    return forgiving


class _SmallRoutes:
    """GET routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def server_info(self, _: Request) -> Response:
        """What is served and within which limits; nothing secret, no paths."""
        service = self._service
        config = service.config
        return _json(
            {
                "model": service.model.name,
                "max_model_len": service.model.max_model_len,
                "vocab_size": service.model.vocab_size,
                "default_sampling": service.model.default_sampling,
                "state": service.engine.state.value,
                "info": service.model.info,
                "engine": service.engine.info,
                "limits": {
                    "max_running_requests": service.context.max_running_requests,
                    "max_queued_requests": config.max_queued_requests,
                    "max_body_bytes": config.max_body_bytes,
                    "max_n": config.max_n,
                    "max_stop": config.max_stop,
                    "max_logprobs": config.max_logprobs,
                    "max_batch_prompts": config.max_batch_prompts,
                },
            }
        )

    async def expert_load(self, request: Request) -> Response:
        """Rows of each expert since the start, in the form of parallel.eplb.load_file."""
        loads = self._service.engine.expert_loads
        if loads is None:
            message = "no loads of experts yet: the model has no experts, or ran few steps"
            return _error(request, RequestError(message, code="no_expert_loads", status=404))
        layers = {str(layer): rows for layer, rows in zip(loads.layers, loads.rows, strict=True)}
        return _json({"layers": layers})

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        try:
            check_model(request.path_params["name"], self._service.model)
        except RequestError as error:
            return _error(request, error)
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "nodeweave",
            "max_model_len": model.max_model_len,
        }


class Tokenize(Endpoint[TokenizeRequest]):
    """Text or a conversation to token ids, in vLLM's form."""

    route = "/tokenize"
    body_type = TokenizeRequest
    rules = ALL
    text_fields = frozenset({"messages", "tools", "prompt"})

    async def handle(self, body: TokenizeRequest, call: Call) -> None:
        service = self.service
        check_model(body.model, service.model)
        if (body.prompt == NULL) == (body.messages == NULL):
            raise RequestError("give either prompt or messages", param="prompt")
        source: ChatText | PromptTexts
        if body.messages == NULL:
            source = PromptTexts(
                prompt=bytes(body.prompt),
                vocab_size=service.model.vocab_size,
                add_special_tokens=body.add_special_tokens is not False,
            )
        else:
            source = chat_text(body, tools=body.tools, max_tokens=MAX_TOKENIZED)
        found = await service.context.text.tokenize(
            TokenList(source=source, strings=bool(body.return_token_strs))
        )
        await send_json(
            call.send,
            {
                "count": found.num_tokens,
                "max_model_len": service.model.max_model_len,
                "tokens": msgspec.Raw(found.tokens),
                "token_strs": msgspec.Raw(found.strings),
            },
        )


class Detokenize(Endpoint[DetokenizeRequest]):
    """Token ids to text, in vLLM's form."""

    route = "/detokenize"
    body_type = DetokenizeRequest
    rules = ALL
    text_fields = frozenset({"tokens"})

    async def handle(self, body: DetokenizeRequest, call: Call) -> None:
        service = self.service
        check_model(body.model, service.model)
        job = IdsToText(tokens=bytes(body.tokens), vocab_size=service.model.vocab_size)
        await send_json(
            call.send, {"prompt": msgspec.Raw(await service.context.text.detokenize(job))}
        )


# Routes of OpenAI's API and of other servers that clients try.
NOT_SERVED = (
    "/v1/embeddings", "/v1/responses", "/v1/moderations", "/v1/images", "/v1/audio", "/v1/files",
    "/v1/batches", "/v1/fine_tuning", "/v1/assistants", "/v1/threads", "/v1/messages", "/v1/rerank",
    "/v1/score", "/generate", "/pooling", "/classify", "/api",
)  # fmt: skip
_SLASHES = re.compile("/{2,}")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(request: Request, error: Exception) -> Response:
    record_of(request.scope).code = code_of(error)
    status, body = as_request_error(error).status, error_body(error)
    response = Response(body, status_code=status)
    response.raw_headers = error_headers(error, body)
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or the wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        app = request.app
        message = _no_route(request.url.path, [*app.state.own_routes, *_paths(app.routes)])
        return _error(request, RequestError(message, code="not_found", status=404))
    allowed = (error.headers or {}).get("Allow", "")
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
    response = _error(
        request,
        RequestError(
            f"method not allowed here; allowed: {allowed}",
            code="method_not_allowed",
            status=error.status_code,
        ),
    )
    if allowed:
        response.headers["allow"] = allowed
    return response


def _paths(routes: Sequence[Any]) -> list[str]:
    return [route.path for route in routes if "{" not in route.path]


def _no_route(path: str, known: Sequence[str]) -> str:
    """What is not there, the closest that is, and all of them."""
    for other in NOT_SERVED:
        if path == other or path.startswith(f"{other}/"):
            return f"{other} is not served here; there are {', '.join(known)}"
    close = get_close_matches(path[:100], known, n=1, cutoff=0.7)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"there is no such route{meant}; there are {', '.join(known)}"


async def _on_exception(request: Request, error: Exception) -> Response:
    return _error(request, error)
