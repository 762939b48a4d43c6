"""What the server and a frontend tell each other of one HTTP request, and the counts of all.

Knows nothing of sockets or of any API. The server makes a record for each request and puts it into
the ASGI scope; the frontend writes down there what only it knows; the access log and /metrics read
it. A frontend that writes nothing is served all the same.
"""

import time
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

EXTENSION = "nodeweave"  # scope["extensions"][EXTENSION] is the RequestRecord
NO_ROUTE = "none"  # the route of requests that reached none
PROBES = ("/health", "/ready")  # answered by every server itself, and without a key
CLIENT_CLOSED = 499  # as web servers log a request whose client went away before its answer


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. The server fills the first group, the frontend may fill the second."""

    request_id: str = ""
    client: str = ""  # address and port
    method: str = ""
    path: str = ""  # as it is routed: decoded, without the query
    status: int = 0  # 0: nothing was answered yet
    bytes_in: int = 0  # of the body, as the frontend got it
    bytes_out: int = 0  # of the answer's body
    begin_s: float = field(default_factory=time.perf_counter)  # when its headers were complete
    first_byte_s: float | None = None  # from `begin_s` to the answer's first byte
    duration_s: float = 0.0  # from `begin_s` to the end
    is_own: bool = False  # a probe, or a scrape of metrics: the server answered it itself

    route: str = NO_ROUTE  # one of few: it labels a metric
    code: str = ""  # the word for what went wrong, one of few: it labels a metric
    answer_id: str = ""  # the id inside the answer
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None
    finish_reason: str = ""  # of several answers each once, in order
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # added to the answer's


@dataclass(slots=True)
class HttpStats:
    """Counts of one server, for /metrics. Filled by the server."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    refusals: Counter[str] = field(default_factory=Counter)  # by code, of status 400 and above
    connections: int = 0  # open now
    connections_evicted: int = 0  # idle ones that made room for others
    body_bytes: int = 0  # of the bodies of requests that are under way now

    def count(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.responses[record.route, record.status] += 1
        if record.status >= 400:
            self.refusals[record.code or str(record.status)] += 1


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The record of a request; under a server that makes none, one that nobody reads."""
    record = (scope.get("extensions") or {}).get(EXTENSION)
    return record if isinstance(record, RequestRecord) else RequestRecord()
