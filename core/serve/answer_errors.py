"""Errors that a frontend lets through, as HTTP answers: a frontend needs no handling of its own.

Knows nothing of any API. What an answer that has begun lost is left to the server, which cuts the
connection, so that the client sees that something is missing.
"""

import logging

from core.errors import RequestError, WorkerDied
from core.frontend.asgi import App, ClientGone, Receive, Scope, Send, send_error
from core.frontend.errors import code_of
from core.interfaces.http import record_of

log = logging.getLogger(__name__)


def answer_errors(app: App) -> App:
    """An ASGI application that answers RequestError with its status, code and message, and
    WorkerDied with 500, where `app` raised them before its answer began."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting_start(message: Scope) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, noting_start)
        except ClientGone:
            return  # there is nobody to answer
        except (RequestError, WorkerDied) as error:
            if isinstance(error, WorkerDied):
                log.error("the engine ended before an answer did: %s", error)
            if started or scope["type"] != "http":
                raise
            record_of(scope).code = code_of(error)
            await send_error(send, error)

    return answering
