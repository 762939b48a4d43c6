"""The record of one HTTP request, shared by server and frontend, and the counts of all requests.

Knows nothing of sockets or of any API. The server creates a record for each request and puts it
into the ASGI scope. The frontend adds what only it knows. The access log and /metrics read it. A
frontend that adds nothing works too.
"""

import time
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

EXTENSION = "nodeweave"  # scope["extensions"][EXTENSION] is the RequestRecord
NO_ROUTE = "none"  # the route of requests that reached none
PROBES = ("/health", "/ready")  # answered by every server itself, and without a key
CLIENT_CLOSED = 499  # logged if the client disconnected before its answer, as nginx does


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. The server fills the first group of fields, the frontend may fill the second."""

    request_id: str = ""
    client: str = ""  # address and port
    method: str = ""
    path: str = ""  # as it is used for routing: decoded, without the query
    status: int = 0  # 0: no answer yet
    bytes_in: int = 0  # of the body, as the frontend received it
    bytes_out: int = 0  # of the answer's body
    begin_s: float = field(default_factory=time.perf_counter)  # when its headers were complete
    first_byte_s: float | None = None  # from `begin_s` to the answer's first byte
    duration_s: float = 0.0  # from `begin_s` to the end
    is_own: bool = False  # a probe, or a scrape of metrics: the server answered it itself

    route: str = NO_ROUTE  # one of few values, because it is the label of a metric
    code: str = ""  # code of the error, one of few values: it is the label of a metric
    answer_id: str = ""  # the id inside the answer
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None
    finish_reason: str = ""  # with several answers: each reason once, in order
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # added to the answer


@dataclass(slots=True)
class HttpStats:
    """Counts of one server, for /metrics. Filled by the server."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    refusals: Counter[str] = field(default_factory=Counter)  # by code, of status 400 and above
    connections: int = 0  # open now
    connections_evicted: int = 0  # idle ones that were closed to make room
    body_bytes: int = 0  # of the bodies of all requests in progress

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self.responses[record.route, record.status] += 1
        if record.status >= 400:
            self.refusals[record.code or str(record.status)] += 1


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """Return the record of a request. If the server made none, return one that nobody reads."""
    record = (scope.get("extensions") or {}).get(EXTENSION)
    return record if isinstance(record, RequestRecord) else RequestRecord()
