"""What stands between the server and any frontend, from the outside in: guard, pages, errors."""

from collections.abc import Mapping

from core.frontend.asgi import App
from core.interfaces.frontend import FrontendContext
from core.serve.answer_errors import answer_errors
from core.serve.guard import Guard
from core.serve.pages import Page, Pages


def around(
    application: App, context: FrontendContext, pages: Mapping[str, Page], api_key: str | None
) -> App:
    """The application that the server is given. `pages`: those of exporters, by path."""
    inside = Pages(answer_errors(application), context.engine, pages)
    return Guard(inside, context.config, api_key)
