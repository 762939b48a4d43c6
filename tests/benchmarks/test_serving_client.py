"""The client under load: what streams are taken apart to, and a server whose times are known."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.serving import arrivals, client, servers
from benchmarks.serving.arrivals import Lengths
from benchmarks.serving.client import Sent

LENGTHS = Lengths(prompt=40, answer=5, vocab=2000)


# Streams


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def body(texts: list[str], usage: int) -> list[bytes]:
    made = [event(choices=[{"text": text, "finish_reason": None}]) for text in texts]
    made.append(event(choices=[{"text": "", "finish_reason": "length"}]))
    details = {"cached_tokens": 7}
    made.append(
        event(choices=[], usage={"completion_tokens": usage, "prompt_tokens_details": details})
    )
    return [*made, b": a comment\n\n", client.END + b"\n\n"]


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(pieces: list[bytes]) -> bytes:
    frames = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"".join(frames) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("frames", ["chunked", "cut frames", "plain"])
def test_events_are_found_wherever_reads_end(size: int, frames: str) -> None:
    texts = ["a", "b\n\ndata: {", "", "é", "d"]
    pieces = body(texts, 5)
    if frames == "cut frames":  # a chunk need not be an event
        joined = b"".join(pieces)
        pieces = [joined[at : at + 11] for at in range(0, len(joined), 11)]
    raw = chunked(pieces)
    if frames == "plain":
        raw = HEAD + b"\r\n" + b"".join(pieces)
    reads = [(float(at), raw[at : at + size]) for at in range(0, len(raw), size)]
    sent = Sent(0.0, 5, begun=0.0, reads=reads)
    found = client.answer_of(sent)
    assert (found.error, found.num_tokens, found.num_cached) == (None, 5, 7)
    assert len(found.event_times) == 4  # the empty one is no token's text
    assert found.is_whole
    assert found.event_times == sorted(found.event_times)
    if frames == "chunked":  # each at the read that brought its last byte, but its frame's end
        ends = [raw.index(piece) + len(piece) for piece in pieces]
        times = [(end - 1) // size * size for end in ends]
        assert found.event_times == [times[at] for at in (0, 1, 3, 4)]


def test_refusals_and_errors_in_a_stream_are_told() -> None:
    refused = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
    found = client.answer_of(Sent(0.0, 5, reads=[(0.0, refused)]))
    assert found.error is not None
    assert "429" in found.error
    assert "busy" in found.error
    broken = chunked([event(choices=[{"text": "a"}]), event(error={"message": "gone"})])
    found = client.answer_of(Sent(0.0, 5, reads=[(0.0, broken)]))
    assert found.error is not None
    assert "gone" in found.error
    assert not found.is_whole


# The client against a server whose times are known


class Server:
    """Streams what it is asked for, one token a turn of all; notes when it wrote each event."""

    def __init__(self) -> None:
        self.written: list[list[float]] = []
        self.bodies: list[dict] = []
        self.silent_after: int | None = None  # tokens

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        times: list[float] = []
        self.bodies.append(asked)
        self.written.append(times)
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        pieces = body(["x"] * asked["max_tokens"], asked["max_tokens"])
        for number, piece in enumerate(pieces):
            if number == self.silent_after:
                await asyncio.sleep(60)
            await asyncio.sleep(0.002)
            times.append(time.perf_counter())
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()


@contextmanager
def serving(server: Server) -> Iterator[int]:
    started, ports = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        listener = await asyncio.start_server(server.answer, servers.HOST, 0)
        ports.append(listener.sockets[0].getsockname()[1])
        started.set()
        await asyncio.Event().wait()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(serve())
        ports.append(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            for left in asyncio.all_tasks(loop):
                left.cancel()
            loop.run_until_complete(asyncio.sleep(0.01))
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield ports[1]
    finally:
        ports[0]()
        thread.join(10)


def test_times_are_those_at_which_events_came() -> None:
    server = Server()
    load = arrivals.singles("x", 0, 6, 0.0, LENGTHS)
    with serving(server) as port:
        outcome = client.drive(servers.HOST, port, "m", load, time.perf_counter() + 30)
    assert not outcome.was_cut
    assert all(each.is_whole for each in outcome.answers)
    assert [each.num_cached for each in outcome.answers] == [7] * 6
    asked = {tuple(each["prompt"]) for each in server.bodies}
    assert asked == {tuple(each.turns[0].prompt) for each in load.conversations}
    assert all(each["stream"] and each["ignore_eos"] for each in server.bodies)
    written = sorted(time for times in server.written for time in times[: LENGTHS.answer])
    came = sorted(time for each in outcome.answers for time in each.event_times)
    assert len(written) == len(came) == 6 * LENGTHS.answer
    assert all(late >= early for early, late in zip(written, came, strict=True))
    assert all(outcome.begin <= each.due <= each.event_times[0] for each in outcome.answers)


def test_turns_follow_each_other_after_their_pause() -> None:
    server = Server()
    load = arrivals.multi_turn("m", 0, 2, 0.0, LENGTHS, turns=3, shared_tokens=4, pause_s=0.02)
    with serving(server) as port:
        outcome = client.drive(servers.HOST, port, "m", load, time.perf_counter() + 30)
    assert sum(each.is_whole for each in outcome.answers) == 6
    by_length = sorted(server.bodies, key=lambda each: len(each["prompt"]))
    assert [len(each["prompt"]) for each in by_length] == [44, 44, 89, 89, 134, 134]
    for each in load.conversations:
        begun = []
        for turn in each.turns:
            at = [asked["prompt"] for asked in server.bodies].index(turn.prompt)
            begun.append((server.written[at][0], server.written[at][-1], turn.pause_s))
        for (_, ended, _), (began, _, pause) in itertools.pairwise(begun):
            assert began >= ended + pause


def test_time_that_is_over_ends_a_load_with_what_came() -> None:
    server = Server()
    server.silent_after = 3
    load = arrivals.singles("x", 0, 2, 0.0, LENGTHS)
    with serving(server) as port:
        outcome = client.drive(servers.HOST, port, "m", load, time.perf_counter() + 0.8)
    assert outcome.was_cut
    assert {each.error for each in outcome.answers} == {client.CUT}
    assert all(len(each.event_times) <= 3 and not each.is_whole for each in outcome.answers)


def test_nobody_there_is_an_error_of_each_request() -> None:
    load = arrivals.singles("x", 0, 2, 0.0, LENGTHS)
    port = servers.free_port()
    outcome = client.drive(servers.HOST, port, "m", load, time.perf_counter() + 30)
    assert len(outcome.answers) == 2
    assert not any(each.is_whole for each in outcome.answers)
    assert all("refused" in (each.error or "").lower() for each in outcome.answers)
