"""What the client under load asks for, the figures made of it, and the servers that it starts."""

import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import serve_http
from benchmarks.serving import arrivals, client, report, servers
from benchmarks.serving.arrivals import Lengths
from benchmarks.serving.client import Answer, Outcome

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
