"""What a client is told of an error, and when it should come back."""

import json

import pytest

from core.errors import RequestError, WorkerDied
from core.frontend.errors import as_request_error, error_body, error_headers


def told(status, code):
    error = RequestError("no", code=code, status=status)
    return dict(error_headers(error, error_body(error)))


@pytest.mark.parametrize(
    ("status", "code", "seconds"),
    [
        (429, "queue_full", b"1"),
        (503, "too_many_connections", b"1"),
        (503, "too_many_bodies", b"1"),
        (503, "engine_starting", b"5"),
        (503, "queue_timeout", b"5"),
        (503, "engine_dead", b"5"),
        (500, "engine_dead", None),
        (400, "out_of_range", None),
    ],
)
def test_when_to_come_back(status, code, seconds):
    assert told(status, code).get(b"retry-after") == seconds


def test_headers_that_say_what_was_missing():
    assert told(401, "invalid_api_key")[b"www-authenticate"] == b"Bearer"
    assert told(415, "unsupported_encoding")[b"accept-encoding"] == b"gzip"
    assert b"accept-encoding" not in told(415, "unsupported_media_type")


def test_no_error_says_much():
    error = RequestError("\x00long " * 400, param="p" * 100, code="c" * 100)
    body = error_body(error)
    assert len(body) < 4096
    said = json.loads(body)["error"]
    assert (len(said["message"]), len(said["param"]), len(said["code"])) == (800, 64, 64)
    assert said["message"].isprintable()
    assert as_request_error(WorkerDied("x")).status == 500
    assert "secret" not in str(as_request_error(ValueError("secret")))
