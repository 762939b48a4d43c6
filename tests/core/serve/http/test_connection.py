"""One connection without sockets and without waiting: what a client may send, hold and delay."""

import asyncio
import gc
import gzip
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import clock_loop
from tests.support.http_peer import Server, answers, settle

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def post(body=b"hello", extra=b"", length=None, version=b"1.1"):
    size = len(body) if length is None else length
    head = b"POST / HTTP/%b\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n" % (version, size, extra)
    return head + body


async def echo(scope, receive, send):
    """Answers with the method, the path and the size of the body."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    answer = f"{scope['method']} {scope['path']} {size}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})


class Stream:
    """An application that streams what a test gives it; one for all requests."""

    def __init__(self):
        self.pieces = asyncio.Queue()
        self.calls = 0
        self.gone = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.calls += 1
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.disconnect":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(lambda _: self.gone.set())
        while (piece := await self.pieces.get()) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        watch.cancel()


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


@pytest.mark.parametrize(
    ("data", "drip", "seconds", "status"),
    [
        (b"", b"", 10, 408),
        (b"\r\n", b"\r\n", 10, 408),
        (b"GET / HT", b"", 10, 408),
        (b"GET /", b"x", 10, 408),
        (b"GET / HTTP/1.1\r\nA: b\r\n", b"A: b\r\n", 10, 408),
        (post(b"he", length=500), b"x", 60, 408),
        (CHUNKED, b"1\r\na\r\n", 60, 408),
        (CHUNKED + b"1;a=", b"x", 60, 408),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"A: b\r\n", 60, 408),
        (CHUNKED + b"1\r\na\r\n0\r\nA: b", b"b", 60, 408),
        (GET, b"", 30, None),
        (GET, b"\r\n", 30, None),
    ],
)
def test_each_state_has_a_deadline_that_dripping_does_not_move(data, drip, seconds, status):
    async def main():
        server = Server(echo, head_s=10, body_s=60, idle_s=30, linger_s=2, discard_s=10)
        peer = server.connect()
        await peer.say(data)
        num_answers = len(answers(peer.heard))
        for _ in range(9):
            await asyncio.sleep(seconds / 10)
            await peer.say(drip)
            assert not peer.is_ending()
        await asyncio.sleep(seconds / 10 + 0.1)
        assert peer.is_ending()
        told = [found for found, _ in answers(peer.heard)[num_answers:]]
        assert told == ([] if status is None else [status])
        await asyncio.sleep(10.1)
        assert peer.closed, "though the client never closes its side"
        assert server.stats.connections == 0

    clock_loop.run(main())


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", GET), (b"GET / HT", GET[8:]), (post(b"he", length=5), b"llo"), (GET, GET)],
)
def test_time_in_which_the_server_was_paused_does_not_count(before, after):
    """A process that goes on runs its timers before it reads what has come meanwhile."""

    async def main():
        peer = Server(echo).connect()
        await peer.say(before)
        asyncio.get_running_loop().pause(1000)
        await settle()
        assert not peer.is_ending()
        await peer.say(after)
        assert {status for status, _ in answers(peer.heard)} == {200}
        await asyncio.sleep(100)
        assert peer.closed

    clock_loop.run(main())


@pytest.mark.parametrize(
    ("begin", "piece", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n", 431),
        (b"GET /", b"x", 431),
        (CHUNKED + b"1;", b"a=b;", 400),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n", None),
        (CHUNKED, b"1;" + b"e" * 40 + b"\r\na\r\n", 400),
        (b"\r\n", b"\r\n", 400),
        (GET + b"\r\n", b"\r\n", None),
    ],
)
def test_every_byte_that_is_no_body_is_counted(begin, piece, status):
    """None: the request was well formed so far, and its answer may have gone out."""

    async def main():
        server = Server(echo, max_head_bytes=4096, max_headers=10**6)
        peer = server.connect()
        await peer.say(begin)
        sent = 0
        while not peer.is_ending():
            assert sent <= 4096 * 2, "it takes no end"
            await peer.say(piece * 16)
            sent += len(piece) * 16
        if status is not None:
            assert [found for found, _ in answers(peer.heard)] == [status]

    clock_loop.run(main())


def test_tiny_chunks_are_no_attack():
    async def main():
        peer = Server(echo, max_head_bytes=1024).connect()
        await peer.say(CHUNKED)
        for _ in range(1000):
            await peer.say(b"1\r\na\r\n")
        await peer.say(b"0\r\nA: b\r\n\r\n")
        assert answers(peer.heard) == [(200, b"POST / 1000")]

    clock_loop.run(main())


def test_too_many_headers():
    async def main():
        peer = Server(echo, max_headers=16).connect()
        await peer.say(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 16 + b"\r\n")
        assert [status for status, _ in answers(peer.heard)] == [431]

    clock_loop.run(main())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (post(b"he").replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"), 400),
        (post(b"he").replace(b"Content-Length: 2", b"Content-Length: 2, 2"), 400),
        (post(b"he").replace(b"Content-Length: 2", b"Content-Length: +2"), 400),
        (post(b"he").replace(b"Content-Length: 2", b"Content-Length: -2"), 400),
        (post(b"he", b"Transfer-Encoding: chunked\r\n"), 400),
        (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", 501),
        (CHUNKED.replace(b"chunked", b"chunked\r\nTransfer-Encoding: chunked"), 400),
        (CHUNKED.replace(b"chunked", b"identity"), 501),
        (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n", 400),
        (CHUNKED + b"fffffffffffffffff\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"3\r\nabcd\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (post(b"he", b"Expect: 200-maybe\r\n"), 417),
        (post(b"he", b"Content-Encoding: br\r\n"), 415),
        (post(b"he", b"Content-Encoding: gzip\r\n"), 400),
    ],
)
def test_what_is_no_request_of_ours(request_bytes, status):
    async def main():
        server = Server(echo)
        peer = server.connect()
        await peer.say(request_bytes)
        assert [found for found, _ in answers(peer.heard)] == [status]
        assert server.records[-1].status == status
        assert server.records[-1].code
        if status not in (415,):
            await asyncio.sleep(130)
            assert peer.closed
        assert server.stats.body_bytes == 0

    clock_loop.run(main())


def test_a_target_with_a_host_outranks_the_header():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["path"], [v for k, v in scope["headers"] if k == b"host"]))
        await echo(scope, receive, send)

    async def main():
        peer = Server(app).connect()
        await peer.say(b"GET http://evil.example:8/a%2fb?c HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await peer.say(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert seen == [("/a/b", [b"evil.example:8"]), ("*", [b"localhost"])]

    clock_loop.run(main())


@pytest.mark.parametrize("pieces", [1, 3, 200])
def test_an_upgrade_is_ignored_and_its_body_is_a_body(pieces):
    """The parser takes what follows such a head for another protocol; it must not become a
    request of its own. Java's client asks for h2c in each first request."""
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    chunked = CHUNKED.replace(b"\r\n\r\n", b"\r\n" + asks + b"\r\n")
    data = post(smuggled, asks) + chunked + b"5\r\nhello\r\n0\r\n\r\n"
    data += (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + GET
    )

    async def main():
        peer = Server(echo).connect()
        step = len(data) // pieces + 1
        for at in range(0, len(data), step):
            await peer.say(data[at : at + step])
        size = len(smuggled)
        expected = [b"POST / %d" % size, b"POST / 5", b"GET /ws 0", b"GET / 0"]
        assert answers(peer.heard) == [(200, body) for body in expected]

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


def test_a_reader_that_takes_nothing_is_given_up():
    async def main():
        stream = Stream()
        server = Server(stream, stall_s=120)
        peer = server.connect()
        peer.reads = False
        await peer.say(GET)
        stream.pieces.put_nowait(b"x" * 100_000)
        stream.pieces.put_nowait(b"y")
        await settle()
        for _ in range(10):  # slow, but it reads
            await asyncio.sleep(119)
            peer.take(4000)
            assert not peer.closed
        await asyncio.sleep(250)
        assert peer.closed
        assert stream.gone.is_set()
        stream.pieces.put_nowait(None)
        await settle()
        assert server.records[-1].status == 499

    clock_loop.run(main())


@pytest.mark.parametrize("extra", [b"", b"Connection: close\r\n"])
def test_an_answer_that_nobody_reads_does_not_keep_a_closing_connection(extra):
    async def main():
        server = Server(echo, stall_s=120, idle_s=30)
        peer = server.connect()
        peer.reads = False
        await peer.say(post(extra=extra))
        await asyncio.sleep(300)
        assert peer.closed
        assert server.stats.connections == 0

    clock_loop.run(main())


@pytest.mark.parametrize("encoding", [b"", b"Content-Encoding: gzip\r\n"])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(encoding, chunked):
    async def main():
        server = Server(echo, max_body_bytes=100_000)
        peer = server.connect()
        for size, status in ((100_000, 200), (100_001, 413), (3_000_000, 413)):
            body = bytes(size)
            body = gzip.compress(body) if encoding else body
            if chunked:
                head = CHUNKED.replace(b"\r\n\r\n", b"\r\n" + encoding + b"\r\n")
                await peer.say(head + b"%x\r\n" % len(body))
                await peer.say(body)
                await peer.say(b"\r\n0\r\n\r\n")
            else:
                await peer.say(post(body, encoding))
            await settle(200)
            assert answers(peer.heard)[-1][0] == status, size
        assert len(answers(peer.heard)) == 3, "the connection goes on"
        assert server.stats.body_bytes == 0

    clock_loop.run(main())


@pytest.mark.parametrize(
    "body",
    [
        gzip.compress(b"hello")[:-1],
        gzip.compress(b"hello") + b"trailing",
        gzip.compress(b"hello")[:-8] + b"\0" * 8,
        b"hello",
        gzip.compress(b"") * 17,
        b"",
    ],
    ids=["cut off", "more behind", "wrong sum", "no gzip", "17 empty ones", "nothing"],
)
def test_broken_gzip(body):
    async def main():
        server = Server(echo)
        peer = server.connect()
        await peer.say(post(body, b"Content-Encoding: gzip\r\n"))
        assert [status for status, _ in answers(peer.heard)] == [400]
        assert server.records[-1].code == "invalid_encoding"

    clock_loop.run(main())


def test_gzip_in_small_pieces_and_several_members():
    text = random.Random(1).randbytes(300_000)

    async def main():
        peer = Server(echo).connect()
        body = gzip.compress(text) + gzip.compress(b"")
        await peer.say(post(b"", b"Content-Encoding: GZIP\r\n", length=len(body)))
        for at in range(0, len(body), 10_000):
            await peer.say(body[at : at + 10_000])
        await settle(200)
        assert answers(peer.heard) == [(200, b"POST / 300000")]

    clock_loop.run(main())


@pytest.mark.parametrize("encoding", [b"", b"Content-Encoding: gzip\r\n"])
def test_the_bodies_of_all_requests_have_a_limit(encoding):
    async def main():
        stream = Stream()
        server = Server(stream, max_total_body_bytes=250_000)
        body = gzip.compress(bytes(100_000)) if encoding else bytes(100_000)
        peers = [server.connect() for _ in range(3)]
        for peer in peers:
            await peer.say(post(body, encoding))
        await settle(100)
        assert [answers(peer.heard) for peer in peers[2:]] != [[]]
        status, told = answers(peers[2].heard)[0]
        assert status == 503
        assert b"too_many_bodies" in told
        assert b"retry-after" in peers[2].heard
        stream.pieces.put_nowait(None)
        peers[1].leave()
        stream.pieces.put_nowait(None)
        await settle()
        assert server.stats.body_bytes == 0
        fourth = server.connect()
        await fourth.say(post(body, encoding))
        stream.pieces.put_nowait(None)
        await settle(100)
        assert answers(fourth.heard)[0][0] == 200

    clock_loop.run(main())


def test_connections_are_capped_and_idle_ones_make_room():
    async def main():
        stream = Stream()
        server = Server(stream, max_connections=4)
        busy = [server.connect() for _ in range(3)]
        for peer in busy:
            await peer.say(GET)
        idle = server.connect()
        newcomer = server.connect()
        await settle()
        assert idle.closed
        await newcomer.say(GET)
        assert stream.calls == 4
        refused = server.connect()
        await settle()
        assert answers(refused.heard)[0][0] == 503
        assert b"retry-after" in refused.heard
        assert not any(peer.closed for peer in [*busy, newcomer])
        assert (server.stats.connections_evicted, server.stats.connections) == (1, 5)
        flood = [server.connect() for _ in range(200)]
        await settle()
        assert server.stats.connections < 100, "most are turned away without a word"
        await asyncio.sleep(2.1)
        assert server.stats.connections == 4
        assert all(peer.closed for peer in flood)

    clock_loop.run(main())


def test_what_follows_an_early_answer_is_dropped_for_a_while():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def main():
        server = Server(app, discard_s=10, max_discarded_bytes=10**6)
        peer = server.connect()
        await peer.say(post(b"x" * 10, length=1000))
        assert answers(peer.heard) == [(401, b"no")]
        await peer.say(b"x" * 990 + GET)
        assert answers(peer.heard) == [(401, b"no")] * 2, "the connection goes on"
        await peer.say(post(b"x" * 10, length=1000))
        await asyncio.sleep(10.1)
        assert peer.closed
        other = server.connect()
        await other.say(post(b"x", length=10**8))
        for _ in range(11):
            await other.say(b"x" * 10**5)
        assert other.closed
        broken = server.connect()
        await broken.say(CHUNKED + b"zz")
        assert [status for status, _ in answers(broken.heard)] in ([400], [401])

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


WORDS = [
    b"GET ", b"POST ", b"HEAD ", b"CONNECT ", b"/", b"*", b"http://x/", b" HTTP/1.1\r\n",
    b" HTTP/1.0\r\n", b"Host: x\r\n", b"Content-Length: 5\r\n", b"Content-Length: 99999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Content-Encoding: gzip\r\n", b"\r\n", b"\r\n\r\n",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\n", b"a: b\r\n", b"1;x=y\r\na\r\n", b"ffff\r\n", b"\0",
    b"hello", gzip.compress(b"hello"), GET, post(), CHUNKED, b"x" * 5000,
]  # fmt: skip


def mutated(rng):
    """Bytes that are nearly a series of requests."""
    if rng.random() < 0.5:
        data = b"".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 12)))
    else:
        data = b"".join(
            rng.choice([GET, post(), CHUNKED + WORDS[19] + WORDS[20]]) for _ in range(5)
        )
    data = bytearray(data)
    for _ in range(rng.randrange(4)):
        if data:
            at = rng.randrange(len(data))
            few = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
            data[at : at + rng.randrange(3)] = few
    return bytes(data)


def run_fuzz(seed):
    """One connection under mutated input: nothing escapes, answers are in form, all of it ends,
    and nothing stays counted."""
    rng = random.Random(seed)
    chosen = rng.choice(["echo", "early", "fails"])

    async def app(scope, receive, send):
        if chosen == "fails" and rng.random() < 0.3:
            raise ValueError
        if chosen == "early" and rng.random() < 0.5:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"no"})
            return
        await echo(scope, receive, send)

    async def main():
        server = Server(app, max_head_bytes=2048, max_body_bytes=4096, max_pipelined=3)
        problems = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        peer = server.connect()
        data = mutated(rng)
        while data:
            step = rng.choice([1, 7, 100, 10_000])
            await peer.say(data[:step])
            data = data[step:]
            if rng.random() < 0.01:
                await asyncio.sleep(rng.choice([1, 11, 61]))
        if rng.random() < 0.3:
            peer.leave()
        await asyncio.sleep(1000)
        assert peer.closed
        assert not problems
        assert not server.state.tasks
        assert (server.stats.connections, server.stats.body_bytes) == (0, 0)
        assert not server.shared.idle
        methods = [record.method for record in server.records]
        if chosen != "fails":
            answers(peer.heard, methods)

    clock_loop.run(main())


@pytest.mark.parametrize("block", range(4))
def test_fuzz(block):
    for seed in range(block * 300, block * 300 + 300):
        try:
            run_fuzz(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error


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
    gc.collect()
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
