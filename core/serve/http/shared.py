"""What all connections of a server have in common. Knows nothing of what they carry."""

from collections.abc import Callable
from typing import Protocol

from core.interfaces.http import HttpStats, RequestRecord
from core.serve.http.exchange import App
from core.serve.http.limits import HttpLimits


class Evictable(Protocol):
    def abort(self) -> None: ...


class Shared:
    """The application, the limits, and the connections that could go."""

    def __init__(
        self,
        app: App,
        limits: HttpLimits,
        stats: HttpStats,
        on_end: Callable[[RequestRecord], None],
    ) -> None:
        """`on_end` gets the record of each request as it ends."""
        self.app = app
        self.limits = limits
        self.stats = stats
        self.on_end = on_end
        # Connections without a request under way, the one that has been so for longest first.
        self.idle: dict[Evictable, None] = {}

    def make_room(self) -> bool:
        """Whether there is room for one more connection; an idle one may have to go for it."""
        if self.stats.connections < self.limits.max_connections:
            return True
        if not self.idle:
            return False
        self.stats.connections_evicted += 1
        next(iter(self.idle)).abort()
        return True
