"""The head of a request: from its line and headers to an ASGI scope, or to why it is refused.

Knows nothing of connections. The parser has seen to the form; this sees to what it lets through
though it is wrong, or though nobody here can do it.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import httptools

from core.interfaces.http import EXTENSION, RequestRecord

REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/@=+-]{1,128}")
_FRAMING = (b"content-length", b"transfer-encoding")
_READ_HERE = frozenset(
    {*_FRAMING, b"content-encoding", b"host", b"expect", REQUEST_ID_HEADER}
)  # fmt: skip

Headers = list[tuple[bytes, bytes]]
Address = tuple[str, int]


class Refusal(NamedTuple):
    """An answer that no application makes."""

    status: int
    code: str
    message: str


NOT_HTTP = Refusal(400, "invalid_http", "this is not a valid HTTP request")
TOO_LARGE = Refusal(431, "headers_too_large", "the request's headers are too large or too many")
NO_PROXY = Refusal(405, "method_not_allowed", "this server is no proxy")


class HeadRefused(Exception):
    """Holds the Refusal."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.message)


@dataclass(frozen=True, slots=True)
class Head:
    """What the headers say. `encoding` is the Content-Encoding in lower case, `announced_bytes` the
    Content-Length."""

    scope: dict[str, Any]
    record: RequestRecord
    expects_continue: bool
    encoding: bytes
    announced_bytes: int | None


def read_head(
    *,
    version: str,
    method: str,
    url: bytes,
    headers: Headers,
    client: Address | None,
    server: Address | None,
) -> Head:
    """Names in `headers` are lower case. Raises HeadRefused."""
    if version not in ("1.0", "1.1"):
        message = "this server speaks HTTP/1.1 and HTTP/1.0"
        raise HeadRefused(Refusal(505, "unsupported_version", message))
    if method == "CONNECT":
        raise HeadRefused(NO_PROXY)
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _READ_HERE:
            fields.setdefault(name, []).append(value.strip())
    _check(version, fields)
    try:
        raw_path, query, host = _split_target(url)
        path = unquote(raw_path.decode("ascii"))
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise HeadRefused(NOT_HTTP) from None
    if host is not None:
        # An absolute target outranks the Host header; guards look at that header alone.
        headers = [field for field in headers if field[0] != b"host"] + [(b"host", host)]
    record = RequestRecord(
        request_id=request_id(fields.get(REQUEST_ID_HEADER, [])),
        client=address(client),
        method=method,
        path=path,
    )
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": client,
        "server": server,
        "extensions": {EXTENSION: record},
    }
    lengths = fields.get(b"content-length")
    return Head(
        scope=scope,
        record=record,
        expects_continue=b"expect" in fields,
        encoding=b",".join(fields.get(b"content-encoding", [])).lower(),
        announced_bytes=int(lengths[0]) if lengths else None,
    )


def has_body(headers: Headers) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")
        for name, value in headers
    )


def stand_in(headers: Headers) -> bytes:
    """A head without anything but the framing of the body in `headers`."""
    framing = [b"%b: %b\r\n" % field for field in headers if field[0] in _FRAMING]
    return b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing)


def request_id(values: list[bytes]) -> str:
    """The client's id where it is one, in form and of ordinary length; else a new one."""
    if len(values) == 1 and _REQUEST_ID.fullmatch(values[0]):
        return values[0].decode()
    return secrets.token_hex(16)


def address(peer: Address | None) -> str:
    return "" if peer is None else f"{peer[0]}:{peer[1]}"


def _check(version: str, fields: dict[bytes, list[bytes]]) -> None:
    codings = b",".join(fields.get(b"transfer-encoding", [])).lower()
    if codings and version == "1.0":
        raise HeadRefused(NOT_HTTP)
    if codings not in (b"", b"chunked"):
        message = "Transfer-Encoding may be chunked only"
        raise HeadRefused(Refusal(501, "unsupported_coding", message))
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise HeadRefused(Refusal(400, "invalid_host", "a request has one Host header"))
    expectations = fields.get(b"expect", [])
    if any(value.lower() != b"100-continue" for value in expectations):
        message = "Expect may be 100-continue only"
        raise HeadRefused(Refusal(417, "unsupported_expectation", message))


def _split_target(target: bytes) -> tuple[bytes, bytes, bytes | None]:
    """(path, query, host with port where the target names one)."""
    if target == b"*":
        return target, b"", None
    url = httptools.parse_url(target)
    host = url.host
    if host is not None:
        host = b"[%b]" % host if b":" in host else host
        host += b"" if url.port is None else b":%d" % url.port
    return url.path or b"/", url.query or b"", host
