"""Compressed request bodies, decoded piece by piece so that none can blow up.

Knows nothing of connections. Whoever takes the pieces counts them and stops where it has enough.
"""

import zlib

PIECE_BYTES = 256 * 1024  # a millisecond or less of the event loop
MAX_MEMBERS = 16  # of one body; empty ones would cost time for nothing


class BodyError(Exception):
    """The body is not what its Content-Encoding says."""


class GzipDecoder:
    """Gzip members one after the other, as RFC 1952 allows."""

    def __init__(self) -> None:
        self._inflate = _new_member()
        self._num_members = 1
        self._rest = b""  # input that waits
        self._more = False  # zlib may hold output though there is no input

    def feed(self, data: bytes) -> None:
        self._rest += data

    def take(self) -> bytes:
        """The next bytes, at most PIECE_BYTES; none where input has to come first.

        Raises BodyError.
        """
        while self._rest or self._more:
            if self._inflate.eof:
                self._next_member()
            try:
                piece = self._inflate.decompress(self._rest, PIECE_BYTES)
            except zlib.error as error:
                raise BodyError("the body is not valid gzip") from error
            self._rest = self._inflate.unconsumed_tail or self._inflate.unused_data
            self._more = len(piece) == PIECE_BYTES and not self._inflate.eof
            if piece:
                return piece
        return b""

    def finish(self) -> None:
        """The input has ended. Raises BodyError where the last member has not."""
        if not self._inflate.eof:
            raise BodyError("the gzip body ends too early")

    def _next_member(self) -> None:
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise BodyError(f"the body has more than {MAX_MEMBERS} gzip members")
        self._inflate = _new_member()


def _new_member() -> "zlib._Decompress":
    return zlib.decompressobj(wbits=31)  # a gzip header and checksum are required
