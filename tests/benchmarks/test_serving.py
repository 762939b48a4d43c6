"""The client under load: arrivals, what streams are taken apart to, and the figures made of it."""

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import serve_http
from benchmarks.serving import arrivals, client, report, servers
from benchmarks.serving.arrivals import Lengths
from benchmarks.serving.client import Answer, Outcome, Sent

LENGTHS = Lengths(prompt=40, answer=5, vocab=2000)


# Arrivals


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    first, again = (arrivals.singles("x", 1, 20, 5.0, LENGTHS) for _ in range(2))
    other = arrivals.singles("x", 2, 20, 5.0, LENGTHS)
    assert first == again
    prompts = [tuple(each.turns[0].prompt) for each in first.conversations]
    others = [tuple(each.turns[0].prompt) for each in other.conversations]
    assert len(set(prompts + others)) == 40
    assert all(len(prompt) == LENGTHS.prompt for prompt in prompts)
    assert all(arrivals.LOWEST_ID <= token < LENGTHS.vocab for p in prompts for token in p)


def test_poisson_arrivals_have_its_rate_and_its_spread() -> None:
    times = arrivals.poisson_times(random.Random(3), 8.0, 4000)
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.08)  # as long as its mean
    in_a_second = np.histogram(times, bins=np.arange(0, int(times[-1])))[0]
    assert in_a_second.var() == pytest.approx(in_a_second.mean(), rel=0.25)
    assert arrivals.poisson_times(random.Random(3), 0.0, 3) == [0.0, 0.0, 0.0]


def test_a_turn_repeats_the_former_one_and_conversations_share_a_beginning() -> None:
    load = arrivals.multi_turn("m", 0, 3, 1.0, LENGTHS, turns=3, shared_tokens=16, pause_s=1.0)
    assert load.num_requests == 9
    for each in load.conversations:
        lengths = [len(turn.prompt) for turn in each.turns]
        assert lengths == [16 + 40, 16 + 40 + 5 + 40, 16 + 2 * (40 + 5) + 40]
        assert each.turns[0].pause_s == 0
        for former, turn in itertools.pairwise(each.turns):
            assert turn.prompt[: len(former.prompt)] == former.prompt
            assert turn.pause_s > 0
    starts = [each.turns[0].prompt for each in load.conversations]
    assert len({tuple(start[:16]) for start in starts}) == 1
    assert len({tuple(start[16:]) for start in starts}) == 3
    assert arrivals.longest_sequence([load]) == 16 + 2 * 45 + 40 + 5


def test_paced_loads_ask_for_their_share_of_the_peak() -> None:
    arguments = serve_http.parsed([".", "--paced-s", "100"])
    load = serve_http.made_load("poisson_40", arguments, LENGTHS, 500.0)
    assert load.rate * LENGTHS.answer == pytest.approx(0.4 * 500)
    assert load.num_requests == 4000
    turns = serve_http.made_load("multi_turn", arguments, LENGTHS, 500.0)
    assert turns.rate * arguments.turns == pytest.approx(load.rate)


# Figures


def answer(due: float, times: list[float], tokens: int | None = None) -> Answer:
    count = len(times) if tokens is None else tokens
    return Answer(due, due + 0.001, times, count, 3, count, None)


def test_figures_are_numpys() -> None:
    rng = random.Random(5)
    answers = []
    for _ in range(60):
        due = rng.uniform(0, 2)
        times = [due + 0.1 + rng.expovariate(20)]
        for _ in range(rng.randrange(2, 30)):
            times.append(times[-1] + rng.expovariate(80))
        answers.append(answer(due, times))
    limits = report.Limits(ttft_ms=140.0, tpot_ms=13.0)
    end = max(each.event_times[-1] for each in answers)
    row = report.summarise(Outcome(0.0, end, answers, False, [0.001, 0.004], 0.5), limits, 2)
    ttft = np.array([(each.event_times[0] - each.due) * 1e3 for each in answers])
    gaps = np.concatenate([np.diff(each.event_times) * 1e3 for each in answers])
    tpot = np.array([np.diff(each.event_times).mean() * 1e3 for each in answers])
    for name, values in (("ttft_ms", ttft), ("itl_ms", gaps), ("tpot_ms", tpot)):
        for percent in report.PERCENTILES:
            expected = np.percentile(values, percent)
            assert row[name][f"p{percent}"] == pytest.approx(expected, abs=0.006)
        assert row[name]["mean"] == pytest.approx(values.mean(), abs=0.006)
    tokens = sum(each.num_tokens for each in answers)
    assert row["out_tok_s"] == pytest.approx(tokens / end, abs=0.06)
    assert row["tok_s_gpu"] == pytest.approx(tokens / end / 2, abs=0.06)
    good = int(((ttft <= 140) & (tpot <= 13)).sum())
    assert 0 < good < 60
    assert row["good_share"] == pytest.approx(good / 60, abs=1e-4)
    assert row["goodput_req_s"] == pytest.approx(good / end, abs=1e-3)
    users = [each.num_tokens / (each.event_times[-1] - each.due) for each in answers]
    slow = np.percentile([1 / user for user in users], 99)
    assert row["user_tok_s"]["p99"] == pytest.approx(1 / slow, abs=0.01)
    assert row["client"]["late_ms"]["max"] == 1.0
    assert row["client"]["loop_lag_ms"]["max"] == 4.0
    assert row["cached_tokens"] == 180


def test_what_is_not_whole_counts_nowhere_but_is_told() -> None:
    cut = Answer(0.0, 0.0, [0.1], 1, None, 5, client.CUT)
    short = Answer(0.0, 0.0, [0.1, 0.2], 2, None, 5, None)
    whole = answer(0.0, [0.1, 0.2])
    outcome = Outcome(0.0, 1.0, [cut, short, whole], True, [], 0.0)
    row = report.summarise(outcome, report.Limits(500, 500))
    assert (row["requests"], row["whole"], row["out_tok_s"], row["was_cut"]) == (3, 1, 2.0, True)
    assert row["good_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert row["errors"] == [client.CUT, "too few tokens"]


def test_a_ratio_above_one_says_that_ours_is_ahead() -> None:
    ours = {"out_tok_s": 120.0, "ttft_ms": {"p50": 10.0}, "itl_ms": {"p99": 0.0}}
    peer = {"out_tok_s": 100.0, "ttft_ms": {"p50": 15.0}, "itl_ms": {"p99": 3.0}}
    found = report.ratios(ours, peer)
    assert found == {
        "out_tok_s": 1.2,
        "ttft_ms.p50": 1.5,
        "mean": pytest.approx((1.2 * 1.5) ** 0.5, abs=1e-4),
    }
    rows = [
        {"server": "ours", "load": "x", **ours},
        {"server": "ours", "peer": "vllm", "load": "x", "ratios": found},
    ]
    table = report.table(rows).splitlines()
    assert len(table) == 4
    assert "| x | ours / vllm | 1.20 |" in table[3]
    assert table[3].endswith("| 1.342 |")


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


# Servers


def test_every_id_of_a_made_up_tokenizer_is_text_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": [700]}))
    folder = servers.model_folder(source, tmp_path / "made")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.token_to_id("<|end|>") == 700
    texts = {tokenizer.decode([token]) for token in range(256, 1000) if token != 700}
    assert len(texts) == 743
    assert tokenizer.encode(" hello").ids  # text is taken, too
    assert servers.model_folder(folder, tmp_path / "again") == folder


def test_a_peers_command_holds_variables_and_options() -> None:
    found = servers.peer_words("A=1 B='x y' python3 -- --max-num-seqs 8")
    assert found == ({"A": "1", "B": "x y"}, ["python3"], ["--max-num-seqs", "8"])
    made = servers.vllm("vllm", Path("/m/tiny"), 99, "A=1 py -- --x")(8000)
    assert made.command[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert made.command[-1] == "--x"
    assert made.environment == {"A": "1"}


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    made = servers.Server("bad", ["sh", "-c", "echo no memory; exit 3"], {}, "/ready")
    with (
        pytest.raises(servers.StartError, match="bad ended:\nno memory"),
        servers.running(lambda port: made, tmp_path, time.perf_counter() + 20),
    ):
        pass


class Visits(serve_http.Bench):
    """A bench whose servers are made up: output tokens a second by name."""

    SPEEDS: ClassVar = {"ours": 400.0, "vllm": 500.0, "wide": 600.0}

    def visit(
        self, contestant: serve_http.Contestant, loads: Sequence[str], *, settles: bool = True
    ) -> None:
        for load in loads:
            if self.found(contestant.name, load) is None:
                speed = self.SPEEDS[contestant.name]
                row = {"server": contestant.name, "load": load, "was_cut": False}
                self.put(row | {"out_tok_s": speed, "peak": self.peak})
                if settles:
                    self.settle_peak()


def made_bench(*words: str) -> Visits:
    arguments = serve_http.parsed([".", *words])
    folder = Path("/models/tiny")
    bench = Visits(
        arguments=arguments,
        folder=folder,
        lengths=LENGTHS,
        until=time.perf_counter() + 100,
        logs=folder,
        peak=arguments.peak,
        contestants=serve_http.contestants_of(arguments, folder, 99),
    )
    serve_http.run(bench)
    return bench


def test_all_are_asked_for_shares_of_the_faster_ones_peak() -> None:
    words = ["--peer", "vllm=python3", "--variant", "wide=engine.x=1"]
    bench = made_bench(*words, "--variant-loads", "poisson_70")
    measured = [
        (row["server"], row["load"], row["peak"]) for row in bench.rows if "out_tok_s" in row
    ]
    assert measured[:2] == [("ours", "all_at_once", None), ("vllm", "all_at_once", None)]
    assert {peak for _, _, peak in measured[2:]} == {500.0}
    assert [load for server, load, _ in measured if server == "wide"] == ["poisson_70"]
    assert len(measured) == 9
    ratios = {
        (row["server"], row["load"]): row["ratios"]["out_tok_s"]
        for row in bench.rows
        if "ratios" in row
    }
    assert ratios["ours", "poisson_40"] == 0.8
    assert ratios["wide", "poisson_70"] == 1.2
    assert len(ratios) == 5


def test_without_a_peer_the_peak_is_ours_and_one_given_holds_for_all() -> None:
    assert made_bench().peak == 400.0
    bench = made_bench("--peak", "123", "--peer", "vllm=python3")
    assert bench.peak == 123.0
    assert not any("peak_of" in row for row in bench.rows)


def test_no_server_is_started_that_could_not_be_measured() -> None:
    bench = made_bench("--loads", "all_at_once")
    (ours,) = bench.contestants
    bench.rows[:] = [
        {"server": "ours", "ready_s": 9.0},
        {"server": "ours", "load": "poisson_40", "wall_s": 16.0},
        {"server": "ours", "load": "all_at_once", "wall_s": 15.0},
    ]
    assert bench.least_s(ours, ["all_at_once", "poisson_40"]) == 24.0
    assert bench.least_s(ours, ["multi_turn"]) == serve_http.LEAST_S


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loads", "poisson_40"], "give --peak"),
        (["--peer", "llama=python3"], "the name is one of vllm, sglang"),
        (["--variant", "engine.x"], "has no name"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve_http.parsed([".", *words])
    assert message in capsys.readouterr().err
