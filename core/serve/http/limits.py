"""How much one client, and all clients together, may take from the HTTP server.

Knows nothing of connections. The numbers are plain data, so that tests take tiny ones.
"""

from dataclasses import dataclass

from core.errors import ResourceError
from core.settings.config import FrontendConfig

MIB = 1024 * 1024
MOST_CONNECTIONS = 8192  # where frontend.max_connections says nothing
SPARE_DESCRIPTORS = 128  # the engine's sockets, files, and connections that are being refused


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Bytes, counts and seconds. Each second is a deadline after which a connection ends."""

    max_head_bytes: int = 16 * 1024  # request line and headers; also trailers, and one chunk's line
    max_headers: int = 256
    max_body_bytes: int = 8 * MIB  # of one body, after decompression
    max_total_body_bytes: int = 256 * MIB  # of all requests under way
    framing_factor: int = 16  # bytes of a chunked body that are no body, for each that is
    max_discarded_bytes: int = 64 * MIB  # of what follows an answer given before the body's end
    max_pipelined: int = 16  # requests of a connection that wait behind the one being answered
    max_connections: int = MOST_CONNECTIONS

    head_s: float = 10.0  # to send the request line and headers, from the first byte
    body_s: float = 60.0  # to send a body, its framing included, from the end of the headers
    idle_s: float = 30.0  # between an answer and the next request
    discard_s: float = 10.0  # to send the rest of a body whose request has been answered
    stall_s: float = 120.0  # for a client to take any byte of an answer that waits for it
    linger_s: float = 2.0  # for a client to read the last answer before its connection ends

    @classmethod
    def of(cls, config: FrontendConfig, max_connections: int) -> "HttpLimits":
        return cls(
            max_body_bytes=config.max_body_bytes,
            max_total_body_bytes=max(config.max_total_body_bytes, config.max_body_bytes),
            idle_s=config.keep_alive_s,
            max_connections=max_connections,
        )


def settle_connections(wanted: int | None, descriptors: int) -> int:
    """How many connections to hold, of a process that may open so many descriptors.

    None takes what the limit allows, up to `MOST_CONNECTIONS`. Raises ResourceError where the limit
    is too low for what was asked, or for any service at all.
    """
    room = descriptors - SPARE_DESCRIPTORS
    if room < (wanted or 1):
        asked = "" if wanted is None else f"frontend.max_connections={wanted} and "
        advice = "raise it" if room < 1 else f"raise it, or set frontend.max_connections to {room}"
        raise ResourceError(
            f"this process may open {descriptors} files (ulimit -Hn), too few for {asked}"
            f"{SPARE_DESCRIPTORS} other descriptors; {advice}"
        )
    return min(room, MOST_CONNECTIONS) if wanted is None else wanted
