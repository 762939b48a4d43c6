"""Lines of the access log, and what becomes of them where they can't be written."""

import json

import pytest

from core.cluster.processes import log_stream
from core.cluster.processes.log_stream import LogWriter
from core.errors import ConfigError
from core.interfaces.http import RequestRecord
from core.serve.access_log import access_log, json_line, text_line
from core.settings.config import FrontendConfig

RECORD = RequestRecord(
    request_id="abc",
    client="10.0.0.9:1234",
    method="POST",
    path="/v1/completions",
    status=200,
    bytes_in=10,
    bytes_out=20,
    first_byte_s=0.25,
    duration_s=1.5,
    route="/v1/completions",
    answer_id="cmpl-1",
    prompt_tokens=3,
    cached_tokens=0,
    completion_tokens=4,
    first_token_s=0.1234567,
    finish_reason="stop,length",
)
HOSTILE = RequestRecord(
    request_id="x",
    method="GET",
    path='/a"\r\n\x1b[2J\u2028é ' + "y" * 10**6,
    status=404,
    code="not_found",
)


def test_json_lines():
    line = json_line(RECORD, 1_700_000_000.5)
    assert line.endswith(b"}\n")
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.500+00:00", "request_id": "abc", "client": "10.0.0.9:1234",
        "method": "POST", "path": "/v1/completions", "route": "/v1/completions", "status": 200,
        "code": None, "answer_id": "cmpl-1", "finish_reason": "stop,length", "prompt_tokens": 3,
        "cached_tokens": 0, "completion_tokens": 4, "first_byte_s": 0.25, "first_token_s": 0.123457,
        "duration_s": 1.5, "bytes_in": 10, "bytes_out": 20,
    }  # fmt: skip


def test_text_lines():
    assert text_line(RECORD, 1_700_000_000.5).decode() == (
        '2023-11-14T22:13:20.500+00:00 10.0.0.9:1234 "POST /v1/completions" 200 1.500s id=abc '
        "answer=cmpl-1 prompt=3 cached=0 completion=4 first_token=0.123s finish=stop,length\n"
    )


def test_a_json_log_tells_of_lost_lines_in_json(monkeypatch):
    written, full = [], [True]

    def write_all(fd, data):
        if full[0]:
            return 0, "No space left on device"
        written.append(data)
        return len(data), None

    monkeypatch.setattr(log_stream, "_write_all", write_all)
    writer = LogWriter()
    log = access_log(FrontendConfig(access_log="json"), writer)
    for _ in range(3):
        log(RECORD)
    writer.drain(60)
    full[0] = False
    log(RECORD)
    writer.close()
    lines = [json.loads(line) for line in b"".join(written).splitlines()]
    assert [line.get("request_id") for line in lines] == [None, "abc"]
    assert (lines[0]["dropped_lines"], lines[0]["reason"]) == (3, "No space left on device")
    assert lines[0]["time"].endswith("+00:00")


@pytest.mark.parametrize("form", [json_line, text_line])
def test_a_path_from_a_stranger_stays_on_its_line(form):
    line = form(HOSTILE, 0.0)
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    assert b"\x1b" not in line
    assert len(line) < 2000
    assert b"not_found" in line


class Lines:
    def __init__(self):
        self.written = []

    def write(self, fd, data):
        self.written.append((fd, data))

    def tell_losses(self, fd, notice):
        self.notice = notice


def test_probes_are_told_only_where_they_fail():
    writer = Lines()
    log = access_log(FrontendConfig(access_log="text"), writer)
    for path, status in (("/health", 200), ("/metrics", 200), ("/ready", 503), ("/v1/models", 200)):
        own = path != "/v1/models"
        log(RequestRecord(method="GET", path=path, status=status, is_own=own))
    assert [b"/ready" in data or b"/v1/models" in data for _, data in writer.written] == [True] * 2
    assert {fd for fd, _ in writer.written} == {1}
    access_log(FrontendConfig(), writer)(RECORD)
    assert len(writer.written) == 2, "off"


def test_files(tmp_path):
    path = tmp_path / "access.log"
    path.write_text("before\n")
    writer = LogWriter()
    log = access_log(FrontendConfig(access_log="json", access_log_file=str(path)), writer)
    log(RECORD)
    writer.drain(10)
    path.write_text("")  # logrotate's copytruncate
    log(RECORD)
    writer.drain(10)
    assert json.loads(path.read_text())["request_id"] == "abc"
    writer.close()
    for wrong in (tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(ConfigError, match="access_log_file"):
            access_log(FrontendConfig(access_log="text", access_log_file=str(wrong)), Lines())
    with pytest.raises(ConfigError, match="off, text, json"):
        FrontendConfig(access_log="yes")


def test_a_full_disk_costs_lines_which_are_counted():
    writer = LogWriter()
    log = access_log(FrontendConfig(access_log="text", access_log_file="/dev/full"), writer)
    for _ in range(3):
        log(RECORD)
    writer.drain(10)
    writer.close()
    assert writer.dropped == 3
