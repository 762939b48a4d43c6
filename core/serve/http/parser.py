"""The requests of one connection, read by httptools, with limits on every byte that is no body.

Tells a listener of heads, bodies and ends, and of what makes no sense. Knows nothing of answers, of
timers or of what the listener does with what is read.
"""

import enum
from typing import Any, NoReturn, Protocol

import httptools

from core.serve.http.head import (
    NO_PROXY,
    NOT_HTTP,
    TOO_LARGE,
    Head,
    HeadRefused,
    Refusal,
    has_body,
    read_head,
    stand_in,
)
from core.serve.http.limits import HttpLimits

Address = tuple[str, int] | None


class ParserState(enum.Enum):
    """Which part of a request comes next."""

    BETWEEN = "between"
    HEAD = "head"
    BODY = "body"


class _Refused(Exception):
    """Raised inside a callback of the parser to stop it."""


class Listener(Protocol):
    """Who hears what was read."""

    deaf: bool  # what still comes is dropped
    client: Address
    server: Address

    @property
    def reads(self) -> bool:
        """Whether a request is being read that somebody wants."""
        ...

    def takes_request(self) -> bool:
        """Whether one more request may be begun."""
        ...

    def head_came(self, head: Head, *, keep_alive: bool) -> None: ...

    def body_came(self, body: bytes) -> Refusal | None:
        """More of the body; returns what the request is refused with."""
        ...

    def message_came(self) -> None:
        """The request's last byte has come."""
        ...

    def break_off(self, refusal: Refusal) -> None:
        """What the client sends makes no sense any more."""
        ...


class RequestParser:
    """Of one connection; `close` it, as httptools and this object refer to each other."""

    def __init__(self, limits: HttpLimits, listener: Listener) -> None:
        self._limits = limits
        self._listener = listener
        self.state = ParserState.BETWEEN
        self.num_messages = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._framing_bytes = 0  # of this message, without its body
        self._gap_bytes = 0  # since the last byte of a head or body
        self._body_bytes = 0
        self._trailer_bytes = 0
        self._in_stand_in = False  # the parser reads a head that we wrote; see _after_upgrade
        self._parser = self._new_parser()

    def close(self) -> None:
        del self._parser, self._listener

    def feed(self, data: bytes) -> None:
        """Bytes of the client's, while the listener is not deaf."""
        self._framing_bytes += len(data)
        self._gap_bytes += len(data)
        self._feed(data)
        if not self._listener.deaf:
            self._check_framing()

    # Callbacks of httptools.

    def on_message_begin(self) -> None:
        if self._in_stand_in or self._listener.deaf:
            return
        self.state = ParserState.HEAD
        self.num_messages += 1
        self._url = b""
        self._headers = []
        self._body_bytes = self._trailer_bytes = 0

    def on_url(self, url: bytes) -> None:
        if not self._in_stand_in:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_stand_in or self._listener.deaf:
            return
        if self.state is ParserState.HEAD:
            self._headers.append((name.lower(), value))
            return
        self._trailer_bytes += len(name) + len(value) + 4  # of a trailer nothing is kept
        if self._trailer_bytes > self._limits.max_head_bytes:
            self._stop(TOO_LARGE)

    def on_headers_complete(self) -> None:
        if self._in_stand_in or self._listener.deaf:
            return
        size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        limits = self._limits
        if size > limits.max_head_bytes or len(self._headers) > limits.max_headers:
            self._stop(TOO_LARGE)
        if not self._listener.takes_request():
            return
        head = self._read_head()
        self._framing_bytes = self._gap_bytes = 0
        self.state = ParserState.BODY
        self._listener.head_came(head, keep_alive=self._parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        if not self._listener.reads:
            return
        self._body_bytes += len(body)
        self._framing_bytes -= len(body)
        self._gap_bytes = 0
        refusal = self._listener.body_came(body)
        if refusal is not None:
            self._stop(refusal)

    def on_message_complete(self) -> None:
        if self._in_stand_in or not self._listener.reads:
            return
        if self._parser.should_upgrade() and has_body(self._headers):
            return  # the body is still to come; see _after_upgrade
        self._listener.message_came()
        self.state = ParserState.BETWEEN
        self._framing_bytes = self._gap_bytes = 0

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # What follows a request that asked to close is dropped, not an error.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _feed(self, data: bytes) -> None:
        while data and not self._listener.deaf:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._parser.get_method() == b"CONNECT":
                    self._listener.break_off(NO_PROXY)
                elif has_body(self._headers):
                    self._after_upgrade()
            except httptools.HttpParserCallbackError as error:
                # Without a name: its traceback leads to this frame, which would keep both alive.
                if not isinstance(error.__context__, _Refused):
                    self._listener.break_off(NOT_HTTP)  # a target that is no URL, for one
            except httptools.HttpParserError:
                self._listener.break_off(NOT_HTTP)

    def _after_upgrade(self) -> None:
        """An Upgrade that is ignored, of a request with a body. The parser takes what follows the
        headers for another protocol; read as a request, it would be smuggled in. A fresh parser
        gets a head that frames the body in the same way."""
        self._parser = self._new_parser()
        self._in_stand_in = True
        self._parser.feed_data(stand_in(self._headers))
        self._in_stand_in = False

    def _check_framing(self) -> None:
        """What belongs to no body stays within its limits, however slowly it comes."""
        most = self._limits.max_head_bytes
        if self.state is ParserState.HEAD and self._framing_bytes > most:
            self._listener.break_off(TOO_LARGE)
        elif self.state is ParserState.BODY and (
            self._gap_bytes > most
            or self._framing_bytes > most + self._limits.framing_factor * self._body_bytes
        ):
            message = "the body's framing is larger than the body"
            self._listener.break_off(Refusal(400, "invalid_framing", message))
        elif self.state is ParserState.BETWEEN and self._gap_bytes > most:
            self._listener.break_off(NOT_HTTP)

    def _read_head(self) -> Head:
        try:
            return read_head(
                version=self._parser.get_http_version(),
                method=self._parser.get_method().decode("ascii"),
                url=self._url,
                headers=self._headers,
                client=self._listener.client,
                server=self._listener.server,
            )
        except HeadRefused as error:
            self._stop(error.refusal)

    def _stop(self, refusal: Refusal) -> NoReturn:
        """Break off from inside a callback of the parser."""
        self._listener.break_off(refusal)
        raise _Refused
