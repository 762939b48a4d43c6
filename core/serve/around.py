"""What stands between the server and any frontend, outside in: guard, own routes, errors."""

from collections.abc import Mapping

from core.frontend.asgi import App
from core.interfaces.frontend import FrontendContext
from core.serve.answer_errors import answer_errors
from core.serve.guard import Guard
from core.serve.own_routes import OwnRoute, OwnRoutes


def around(
    application: App, context: FrontendContext, routes: Mapping[str, OwnRoute], api_key: str | None
) -> App:
    """The application that the server is given. `routes`: those of exporters, by path."""
    inside = OwnRoutes(answer_errors(application), context.engine, routes)
    return Guard(inside, context.config, api_key)
