"""The hostile load itself: every attack reaches a server, and whatever did not hold is told."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from benchmarks.hostile_load import bodies, held
from benchmarks.hostile_load.connection import Target, outcome, send_and_read
from benchmarks.hostile_load.honest import Known, judged
from benchmarks.hostile_load.verdict import problems
from tests.support.http_stack import ANSWER, MODEL, Stack

SHORT = (held.abort, held.trailers, held.pipelining, held.scrape, held.refused_while_sending)
REFUSED = {"400", "403", "404", "405", "408", "413", "415", "417", "429", "431", "501", "505"}
# One that answers before it has read all may end the connection before that is heard.
ENDED = {"closed", "reset", "BrokenPipeError", "hung up"}


@pytest.fixture(scope="module")
def stack():
    with Stack(max_running_requests=1000) as stack:
        yield stack


@pytest.mark.parametrize("attack", [*bodies.ONE_REQUEST, *SHORT], ids=lambda one: one.__name__)
def test_an_attack_is_answered_and_changes_nothing(stack: Stack, attack: Any) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    target = Target(host, int(port), MODEL)
    choice = random.Random(7)

    async def attacked() -> set[str]:
        if attack in SHORT:
            made = [attack(target, choice) for _ in range(2)]
        else:
            made = [send_and_read(target, attack(choice)) for _ in range(2)]
        return set(await asyncio.gather(*map(outcome, made)))

    found = asyncio.run(attacked())
    assert found <= REFUSED | ENDED | {"200", "204"}, found
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=20).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER


KNOWN = Known("?", "Paris is it.", 4, [(5, 2.0), (8, 0.001), (11, 3.0), (12, 3.0)])


@pytest.mark.parametrize(
    ("text", "num_tokens", "verdict"),
    [
        ("Paris is it.", 4, "exact"),
        ("Paris was it.", 4, "tied"),  # differs at the second token, whose two best were equal
        ("London is it.", 4, "wrong"),
        ("Paris is it!", 4, "wrong"),
        ("Paris", 1, "tied"),
        ("Paris is it.", 5, "wrong"),
    ],
)
def test_what_counts_as_the_same_answer(text: str, num_tokens: int, verdict: str) -> None:
    assert judged(KNOWN, text, num_tokens, tie=0.01) == verdict


def held_row() -> dict[str, Any]:
    """A report in which all is well."""
    streams = {"begun": 9, "finished": 9, "exact": 9}
    honest = {"streams": streams, "attack": {"gaps": {"number": 100, "most": 0.9}}}
    metrics = {
        'http_responses_total{route="/v1/models",status="200"}': 5.0,
        'num_requests_live{model_name="m"}': 0.0,
        'kv_cache_pages{model_name="m"}': 10.0,
        'kv_cache_pages_free{model_name="m"}': 4.0,
        'kv_cache_pages_cached{model_name="m"}': 6.0,
    }
    return {
        "minutes": 10,
        "honest": honest,
        "honest_nodes": honest,
        "metrics": metrics,
        "end": {"status": 0},
        "end_nodes": {"status": 0},
        "tracebacks": 0,
    }


def samples(late_mib: float = 100.0, late_descriptors: int = 10) -> list[Any]:
    early, late = {"worker": (100.0, 10)}, {"worker": (late_mib, late_descriptors)}
    return [(float(when), early if when < 400 else late) for when in range(5, 620, 5)]


def test_nothing_is_told_of_a_server_that_held() -> None:
    assert problems(held_row(), samples()) == []
    assert problems(held_row(), samples(late_mib=120)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"end": {"status": 1}}, "end: status 1"),
        ({"tracebacks": 2}, "2 tracebacks in the servers' output"),
        (
            {"honest": {"streams": {"begun": 2, "finished": 1, "lost": 1},
                        "attack": {"gaps": {"most": 0.1}}}},
            "honest: 1 streams lost",
        ),
        (
            {"honest": {"streams": {"begun": 3, "finished": 1}, "attack": {"gaps": {}}}},
            "honest: not every stream finished",
        ),
        (
            {"honest_nodes": {"streams": {"begun": 1, "finished": 1},
                              "attack": {"gaps": {"most": 2.5}}}},
            "honest_nodes: a gap of 2.5 s",
        ),
    ],
)  # fmt: skip
def test_what_did_not_hold_is_told(change: dict[str, Any], line: str) -> None:
    assert problems(held_row() | change, samples()) == [line]


def half_an_hour(mib: Callable[[float], float]) -> list[Any]:
    """Samples of a process that holds `mib(minute)` for good, and now and then a body besides."""
    return [
        (float(when), {"frontend": (mib(when / 60) + 40 * (when // 5 % 2), 10)})
        for when in range(5, 1820, 5)
    ]


@pytest.mark.parametrize(
    ("mib", "told"),
    [
        (lambda minute: 90.0, False),
        (lambda minute: 90 + 0.4 * minute, True),
        (lambda minute: 90 + 0.4 * minute + (7 * minute) % 1, True),  # with some chance
        (lambda minute: 90 + (12 if minute > 14 else 0), False),  # needed once, and kept
        (lambda minute: 90 + min(minute, 12), False),  # filled up
        (lambda minute: 90 + 6 * (minute > 9) + 6 * (minute > 18), False),  # in two steps
        (lambda minute: 90 + 3 * (minute % 7), False),  # comes and goes
        (lambda minute: 90 + 0.1 * minute, False),
    ],
)
def test_a_leak_is_told_from_what_fills_up(mib: Callable[[float], float], told: bool) -> None:
    found = problems(held_row() | {"minutes": 30}, half_an_hour(mib))
    assert len(found) == told, found
    assert not told or found[0].startswith("frontend grows on: ")


def test_growth_and_leaks_are_told() -> None:
    assert problems(held_row(), samples(late_mib=130)) == ["worker grew from 100 to 130 MiB"]
    (line,) = problems(held_row(), samples(late_descriptors=50))
    assert line == "worker had 10 descriptors and has 50"
    row = held_row()
    row["metrics"]['kv_cache_pages_free{model_name="m"}'] = 3.0
    row["metrics"]['http_responses_total{route="/v1/models",status="500"}'] = 1.0
    assert len(problems(row, samples())) == 2
