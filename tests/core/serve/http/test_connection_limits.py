"""One connection without sockets and without waiting: what a client may hold and delay."""

import asyncio

import pytest

from tests.support import clock_loop
from tests.support.http_peer import CHUNKED, GET, Server, Stream, answers, echo, post, settle


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


def test_a_client_that_still_sends_its_body_gets_time_to_read_why_it_is_refused():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def main():
        server = Server(app, discard_s=10, linger_s=2)
        peer = server.connect()
        await peer.say(post(b"x" * 10, extra=b"Connection: close\r\n", length=1000))
        assert answers(peer.heard) == [(401, b"no")]
        assert peer.shut
        await asyncio.sleep(9.9)
        await peer.say(b"x" * 100)
        assert not peer.closed
        await asyncio.sleep(0.2)
        assert peer.closed

    clock_loop.run(main())


def test_what_comes_after_the_end_of_a_connection_has_a_limit():
    async def main():
        server = Server(echo, linger_s=2, max_discarded_bytes=1000)
        peer = server.connect()
        await peer.say(b"no HTTP\r\n\r\n")
        assert [status for status, _ in answers(peer.heard)] == [400]
        await peer.say(b"x" * 1000)
        assert not peer.closed
        await peer.say(b"x")
        assert peer.closed

    clock_loop.run(main())


def test_the_limit_on_what_is_dropped_is_that_of_one_request():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def main():
        server = Server(app, max_discarded_bytes=1000)
        peer = server.connect()
        for number in range(1, 4):
            await peer.say(post(b"x", length=900))
            await peer.say(b"x" * 899)
            assert len(answers(peer.heard)) == number
        assert not peer.is_ending()

    clock_loop.run(main())


def test_a_body_that_the_application_does_not_take_is_not_late():
    async def app(scope, receive, send):
        await asyncio.sleep(200)
        await echo(scope, receive, send)

    async def main():
        peer = Server(app, body_s=60).connect()
        await peer.say(post(b"x" * 100_000, length=100_010))
        assert peer.reading_paused
        await asyncio.sleep(201)
        assert not peer.reading_paused
        await peer.say(b"x" * 10)
        assert answers(peer.heard) == [(200, b"POST / 100010")]

    clock_loop.run(main())
