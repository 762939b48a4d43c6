"""One connection without sockets and without waiting: requests, answers, and how it ends."""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import clock_loop
from tests.support.http_peer import CHUNKED, GET, Server, Stream, answers, echo, post, settle


def test_requests_one_after_the_other_and_pipelined():
    async def main():
        server = Server(echo)
        peer = server.connect()
        await peer.say(post(b"hello") + GET + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n")
        assert answers(peer.heard) == [(200, b"POST / 5"), (200, b"GET / 0"), (200, b"POST / 3")]
        await peer.say(GET)
        assert len(answers(peer.heard)) == 4
        assert [record.status for record in server.records] == [200] * 4
        assert server.stats.body_bytes == 0
        assert not peer.closed

    clock_loop.run(main())


def test_nothing_is_written_into_a_running_stream():
    """Deadlines and errors of what is pipelined behind it wait for their turn."""

    async def main(behind, expected):
        stream = Stream()
        peer = Server(stream).connect()
        await peer.say(GET + behind)
        await asyncio.sleep(500)
        stream.pieces.put_nowait(b"still here")
        for _ in range(1 + behind.count(GET)):
            stream.pieces.put_nowait(None)
        await settle()
        await asyncio.sleep(100)
        assert [status for status, _ in answers(peer.heard)] == expected
        assert answers(peer.heard)[0] == (200, b"still here")
        assert peer.closed

    for behind, expected in [
        (b"GET / HTTP/1.1\r\nA:", [200, 408]),
        (GET + b"GET / HTTP/1.1\r\nA:", [200, 200, 408]),
        (post(b"he", length=5), [200, 408]),
        (b"no request\r\n\r\n", [200, 400]),
        (GET + b"no request\r\n\r\n", [200, 200, 400]),
        (CHUNKED + b"xyz", [200, 400]),
        (b"\r\n", [200]),
    ]:
        clock_loop.run(main(behind, expected))


@pytest.mark.parametrize(
    ("last", "after"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", []),
        (GET + b"no request\r\n\r\n", [400]),
        (GET + GET * 5, [200] * 4),
    ],
    ids=["close", "garbage", "too many"],
)
def test_the_last_answer_of_a_used_connection_takes_its_time(last, after):
    """The deadline for the next request ends as it comes, though nothing is read behind it."""

    async def main():
        stream = Stream()
        peer = Server(stream, max_pipelined=4).connect()
        stream.pieces.put_nowait(None)
        await peer.say(GET)
        await peer.say(last)
        await asyncio.sleep(500)
        assert not peer.is_ending()
        stream.pieces.put_nowait(b"still here")
        for _ in range(5):
            stream.pieces.put_nowait(None)
        await settle(100)
        heard = answers(peer.heard)
        assert [status for status, _ in heard] == [200, 200, *after]
        assert heard[1] == (200, b"still here")
        assert peer.is_ending()

    clock_loop.run(main())


def test_pipelined_requests_are_capped():
    async def main():
        stream = Stream()
        server = Server(stream, max_pipelined=4)
        peer = server.connect()
        await peer.say(GET)
        for _ in range(3):
            await peer.say(GET)
        assert not peer.reading_paused
        await peer.say(GET * 1000)
        assert peer.reading_paused
        assert stream.calls == 1
        for _ in range(5):
            stream.pieces.put_nowait(None)
        await settle(100)
        assert [status for status, _ in answers(peer.heard)] == [200] * 5
        assert stream.calls == 5
        assert b"connection: close" in peer.heard.rsplit(b"HTTP/1.1", 1)[1]
        assert peer.shut

    clock_loop.run(main())


def test_the_bodies_of_pipelined_requests_are_not_read_ahead_without_end():
    async def main():
        stream = Stream()
        server = Server(stream)
        peer = server.connect()
        await peer.say(GET + post(b"", length=10**6))
        sent = 0
        while not peer.reading_paused:
            await peer.say(b"x" * 10_000)
            sent += 10_000
        assert sent < 100_000
        stream.pieces.put_nowait(None)
        await settle()
        assert not peer.reading_paused, "it is its turn"
        await peer.say(b"x" * (10**6 - sent))
        stream.pieces.put_nowait(None)
        await settle()
        assert [status for status, _ in answers(peer.heard)] == [200, 200]
        assert server.stats.body_bytes == 0

    clock_loop.run(main())


def test_a_client_that_leaves_is_noticed_though_it_has_pipelined():
    async def main():
        stream = Stream()
        server = Server(stream)
        peer = server.connect()
        await peer.say(GET + GET)
        peer.leave()
        await settle()
        assert stream.gone.is_set()
        stream.pieces.put_nowait(None)
        await settle()
        assert [record.status for record in server.records] == [499]
        assert server.stats.connections == 0

    clock_loop.run(main())


@pytest.mark.parametrize("keep_alive", [False, True])
def test_http_1_0(keep_alive):
    """No chunks: a stream ends with the connection, an answer of known length need not."""

    async def main():
        stream = Stream()
        peer = Server(stream).connect()
        extra = b"Connection: keep-alive\r\n" if keep_alive else b""
        await peer.say(post(extra=extra, version=b"1.0"))
        stream.pieces.put_nowait(b"one")
        stream.pieces.put_nowait(b"two")
        stream.pieces.put_nowait(None)
        await settle()
        assert answers(peer.heard) == [(200, b"onetwo")]
        assert b"transfer-encoding" not in peer.heard
        assert b"connection: close" in peer.heard
        assert peer.is_ending()

    async def known(scope, receive, send):
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def of_known_length():
        peer = Server(known).connect()
        request = b"GET / HTTP/1.0\r\n%b\r\n" % (b"Connection: keep-alive\r\n" * keep_alive)
        await peer.say(request)
        await peer.say(request)
        assert len(answers(peer.heard)) == (2 if keep_alive else 1)
        assert (b"connection: keep-alive" in peer.heard) == keep_alive

    clock_loop.run(main())
    clock_loop.run(of_known_length())


def test_applications_that_misbehave_end_their_own_request_only():
    async def app(scope, receive, send):
        kind = scope["path"]
        if kind == "/raises":
            raise ValueError("secret")
        if kind == "/nothing":
            return
        if kind == "/split":
            headers = [(b"a", b"b\r\nc: d")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        if kind == "/later":
            raise ValueError("secret")

    async def main():
        for path in ("/raises", "/nothing", "/split"):
            peer = Server(app).connect()
            await peer.say(GET.replace(b"/ ", path.encode() + b" "))
            status, body = answers(peer.heard)[0]
            assert (status, b"secret" in body, b"c: d" in peer.heard) == (500, False, False)
        for path in ("/later", "/open"):
            peer = Server(app).connect()
            await peer.say(GET.replace(b"/ ", path.encode() + b" "))
            assert peer.closed
            assert not peer.heard.endswith(b"0\r\n\r\n"), "the client sees that it is not whole"

    clock_loop.run(main())


def test_a_server_that_ends_finishes_what_is_being_answered():
    async def main():
        stream = Stream()
        server = Server(stream)
        peer, resting = server.connect(), server.connect()
        await peer.say(GET)
        for connection in (peer.connection, resting.connection):
            connection.shutdown()
        await settle()
        assert resting.closed
        assert not peer.is_ending()
        for piece in (b"all", None):
            stream.pieces.put_nowait(piece)
        await settle()
        assert answers(peer.heard) == [(200, b"all")]
        assert peer.is_ending()

    clock_loop.run(main())


def test_how_an_answer_is_framed_is_not_the_applications():
    async def app(scope, receive, send):
        headers = [(b"Transfer-Encoding", b"chunked")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"once"})

    async def main():
        peer = Server(app).connect()
        await peer.say(GET)
        assert answers(peer.heard) == [(200, b"once")]
        assert peer.heard.lower().count(b"transfer-encoding") == 1

    clock_loop.run(main())


def test_request_ids():
    async def main():
        server = Server(echo)
        peer = server.connect()
        for sent in (b"abc-1.2:3/4", b"a" * 129, b"a b", b"", b"<x>", b"a\x00"[:1] + b"\xff"):
            await peer.say(b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + sent + b"\r\n\r\n")
        ids = [record.request_id for record in server.records]
        assert ids[0] == "abc-1.2:3/4"
        assert all(len(found) == 32 and found.isalnum() for found in ids[1:])
        assert len(set(ids)) == 6
        for found in ids:
            assert peer.heard.count(f"x-request-id: {found}\r\n".encode()) == 1
        await peer.say(b"nonsense\r\n\r\n")
        assert f"x-request-id: {server.records[-1].request_id}".encode() in peer.heard

    clock_loop.run(main())


ENDINGS = {
    "nothing said": [],
    "answered": [GET],
    "a head cut off": [GET[:20]],
    "a body cut off": [post(length=90)],
    "a chunk cut off": [CHUNKED + b"5\r\nhel"],
    "several at once": [GET * 20],
    "no HTTP": [b"\x16\x03\x01" * 50],
    "a version that is not spoken": [b"GET / HTTP/3.7\r\nHost: x\r\n\r\n"],
    "two lengths": [post(extra=b"Content-Length: 7\r\n")],
    "a head that is too large": [b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n"],
    "trailers that are too large": [CHUNKED + b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 4000],
    "a proxy": [b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"],
    "an upgrade": [post(extra=b"Upgrade: h2c\r\nConnection: Upgrade\r\n")],
    "broken gzip": [post(extra=b"Content-Encoding: gzip\r\n")],
    "a body that is too large": [post(b"a" * 2000)],
}


@contextmanager
def no_cyclic_collector() -> Iterator[None]:
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("said", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("waits_s", [0, 500])
def test_a_connection_that_ended_is_freed_without_the_cyclic_collector(said, waits_s):
    """That one comes by so rarely that thousands would wait for it, with what they were sent."""

    async def main():
        server = Server(echo, max_body_bytes=1000)
        peer = server.connect()
        for data in said:
            await peer.say(data)
        await asyncio.sleep(waits_s)
        peer.leave()
        await settle()
        connection = weakref.ref(peer.connection)
        del peer.connection  # as a transport forgets it
        return connection()

    with no_cyclic_collector():
        assert clock_loop.run(main()) is None


def test_a_connection_that_ends_while_it_is_answered_is_freed_as_well():
    async def main():
        app = Stream()
        server = Server(app)
        peer = server.connect()
        await peer.say(GET * 3)
        app.pieces.put_nowait(b"a piece")
        await settle()
        peer.leave()
        await settle()
        app.pieces.put_nowait(None)
        await settle()
        connection = weakref.ref(peer.connection)
        del peer.connection  # as a transport forgets it
        return connection()

    with no_cyclic_collector():
        assert clock_loop.run(main()) is None
