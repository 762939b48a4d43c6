"""One connection without sockets and without waiting: what a client may send, and bytes by
chance."""

import asyncio
import gzip
import random

import pytest

from tests.support import clock_loop
from tests.support.http_peer import CHUNKED, GET, Server, Stream, answers, echo, post, settle


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
