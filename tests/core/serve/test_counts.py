"""What is counted of a request, whoever reads its answers."""

import asyncio

import pytest

from core.errors import WorkerDied
from core.interfaces.messages import RequestOutput
from core.serve.answer_stream import AnswerStream
from core.serve.counts import Buckets, Counts


def total(buckets):
    return sum(buckets.counts)


def test_a_value_on_a_bound_belongs_to_it():
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        buckets.observe(value)
    buckets.observe(2.0, times=3)
    found = buckets.histogram("m")
    assert (found.labels, found.counts, found.total) == (("m",), (2, 5, 1), 20.0)
    buckets.observe(0.1)
    assert found.counts == (2, 5, 1), "what was told does not change"


def test_a_request_ends_once_with_its_last_answer():
    counts = Counts()
    meter = counts.begin()
    for _ in range(2):
        meter.hold()
    meter.release()  # whoever began it
    meter.first_token(1e9)
    first = meter.first_token_s
    meter.finish("stop")
    assert total(counts.request_s) == 0
    meter.first_token(2e9)
    meter.finish("length")
    assert (total(counts.request_s), total(counts.first_token_s)) == (1, 2)
    assert meter.first_token_s == first, "the first answer's"
    assert counts.finished == {"stop": 1, "length": 1}


def test_between_two_answers_it_goes_on():
    counts = Counts()
    meter = counts.begin()
    for _ in range(2):
        meter.hold()
        meter.finish("stop")
    assert total(counts.request_s) == 0
    meter.release()
    assert total(counts.request_s) == 1


def test_a_request_that_was_refused_is_not_counted():
    counts = Counts()
    counts.begin().release()
    assert total(counts.request_s) == 0


def read(outputs, ending=None, error=None):
    """The counts of one answer whose outputs are read as they come, closed for this reason."""
    counts = Counts()

    async def run():
        meter = counts.begin()
        loop = asyncio.get_running_loop()
        stream = AnswerStream("r", 0, loop, counts, meter, lambda _: None)
        meter.release()
        for output in outputs:
            stream.put(output)
            assert await anext(stream) is output
        if error is not None:
            stream.fail(error)
            with pytest.raises(type(error)):
                await anext(stream)
        stream.close(ending)
        stream.close("again")

    asyncio.run(run())
    assert total(counts.request_s) == 1
    return counts


def test_a_token_is_counted_as_it_is_read():
    counts = read([RequestOutput("r", [1]), RequestOutput("r", [2, 3]), RequestOutput("r", [4])])
    assert (total(counts.first_token_s), total(counts.next_token_s)) == (1, 3)


def test_what_the_engine_gives_up_is_no_token():
    """A request that waited ten minutes in vain would else be a first token after ten minutes."""
    refused = RequestOutput("r", [], "error", error="too long", error_code="queue_timeout")
    counts = read([refused])
    assert (total(counts.first_token_s), total(counts.next_token_s)) == (0, 0)
    counts = read([RequestOutput("r", [1]), refused])
    assert (total(counts.first_token_s), total(counts.next_token_s)) == (1, 0)
    assert counts.finished == {"error": 1}


@pytest.mark.parametrize(
    ("last", "ending", "error", "counted"),
    [
        ("length", None, None, "length"),
        ("length", "stop", None, "stop"),
        (None, "stop", None, "stop"),
        (None, None, None, "abort"),
        (None, None, WorkerDied("x"), "error"),
        ("error", None, None, "error"),
    ],
)
def test_how_an_answer_ended(last, ending, error, counted):
    """Its reader knows best, who found a stop string; then the engine."""
    assert read([RequestOutput("r", [1], last)], ending, error).finished == {counted: 1}
