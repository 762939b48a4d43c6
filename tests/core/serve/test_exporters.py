"""Metrics of any frontend reach any exporter, and no exporter reaches a request."""

import asyncio
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from core.errors import ConfigError, PluginError, RequestError
from core.interfaces.metrics import ExporterContext
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.serve import exporters as module
from core.serve.exporters import Exporters, make_exporters
from core.settings.compose import compose, parse_overrides
from tests.core.serve.test_answer_errors import small_frontend
from tests.support.http_stack import ANSWER, Stack


class JsonLines:
    """A third party's: one line of JSON a family and push, in a file."""

    interval_s = 3600.0

    def __init__(self, file: Path) -> None:
        self.file = file

    def push(self, families):
        with self.file.open("ab") as lines:
            lines.writelines(msgspec.json.encode(family) + b"\n" for family in families)

    def last(self) -> dict[str, dict[str, Any]]:
        return {f["name"]: f for f in map(json.loads, self.file.read_text().splitlines())}


class Scraped:
    """An exporter made of a function; what an exporter may do wrong is done by that."""

    path, content_type = "/numbers", "text/plain"

    def __init__(self, render):
        self.render = render


class Failing:
    """Fails `fails` times, then lets tests go on."""

    interval_s = 0.01

    def __init__(self, fails: int) -> None:
        self.left, self.works = fails, threading.Event()

    def push(self, families):
        if self.left:
            self.left -= 1
            raise SystemExit("no route to the collector")
        self.works.set()


class Stuck:
    interval_s = 0.01

    def __init__(self) -> None:
        self.calls, self.entered = 0, threading.Event()

    def push(self, families):
        self.calls += 1
        self.entered.set()
        threading.Event().wait()


def test_a_frontend_that_counts_nothing_is_counted(tmp_path, monkeypatch):
    """Its answers by their ends, tokens and times; by an exporter that knows nothing of it, and
    that is given what was counted once more at the end."""
    monkeypatch.setattr(module, "FLUSH_S", 20)
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with (
        Stack(factory=small_frontend, exporters={"lines": lines}) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        assert http.post("/generate", json={}).text == ANSWER
        assert http.post("/generate", json={"stop": ["STOP"]}).status_code == 200
        assert http.post("/generate", json={"temperature": -1}).status_code == 400
        assert http.get("/metrics").status_code == 500, "its own; no exporter has that route"
    found = lines.last()
    ends = {p["labels"][1]: p["value"] for p in found["nodeweave_request_success"]["points"]}
    assert ends == {"stop": 2}
    [first] = found["nodeweave_time_to_first_token_seconds"]["histograms"]
    [whole] = found["nodeweave_e2e_request_latency_seconds"]["histograms"]
    assert (sum(first["counts"]), sum(whole["counts"])) == (2, 2)
    assert found["nodeweave_http_refusals"]["points"][0] == {"labels": ["out_of_range"], "value": 1}


def test_exporters_that_fail_or_hang_cost_no_request(monkeypatch, caplog):
    """Neither do they hold up the end of the server, which this waits for."""
    failing, stuck = Failing(fails=3), Stuck()
    hangs, fails = Scraped(lambda _: threading.Event().wait()), Scraped(lambda _: 1 / 0)
    fails.path = "/fails"
    made = {"failing": failing, "stuck": stuck, "hangs": hangs, "fails": fails}
    with (
        Stack(exporters=made) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        assert stuck.entered.wait(10)
        failed = http.get("/fails/")
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "exporter_failed")
        assert "division" not in failed.text
        assert http.get("/health").status_code == 200
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        assert failing.works.wait(10)
        monkeypatch.setattr(module, "RENDER_S", 0.01)
        for _ in range(module.MAX_WAITING + 2):
            slow = http.get("/numbers")
            assert (slow.status_code, slow.json()["error"]["code"]) == (503, "exporter_timeout")
        assert "/numbers, /fails" in http.get("/nothing").json()["error"]["message"]
    assert stuck.calls == 1
    told = [record.message for record in caplog.records if "'failing'" in record.message]
    assert told == ["the metrics exporter 'failing' failed; it is tried again"]


def test_scrapes_that_wait_are_bounded(monkeypatch):
    """Each holds all numbers, and a scraper does not stop asking."""
    monkeypatch.setattr(module, "RENDER_S", 0.0)
    collected = []
    hangs = Scraped(lambda _: threading.Event().wait())
    exporters = Exporters({"hangs": hangs}, lambda: collected.append(1) or [])

    async def run():
        for _ in range(3 * module.MAX_WAITING):
            with pytest.raises(RequestError, match="takes too long"):
                await exporters.routes["/numbers"]()

    asyncio.run(run())
    assert len(collected) == module.MAX_WAITING


def test_routes_want_the_key_and_know_their_methods():
    page = Scraped(lambda families: b"%d families" % len(families))
    with (
        Stack(api_key="k", factory=small_frontend, exporters={"page": page}) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        assert http.get("/numbers").status_code == 401
        assert http.get("/ready").json() == {"status": "ready"}, "probes need no key"
        key = {"authorization": "Bearer k"}
        assert http.get("/numbers//", headers=key).text.endswith(" families")
        assert http.head("/numbers", headers=key).headers["content-type"] == "text/plain"
        refused = http.post("/numbers", headers=key)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        assert http.options("/numbers", headers=key).headers["allow"] == "GET, HEAD, OPTIONS"
        assert http.post("/generate", json={}, headers=key).text == ANSWER
        http.get("/health")  # read once the last one has ended
    own = {record.path: record.is_own for record in stack.records if record.status != 401}
    assert own.items() >= {"/ready": True, "/numbers": True, "/generate": False}.items()


@dataclass(slots=True, kw_only=True)
class LinesOptions:
    file: str


class Plugin:
    """As a third party would write it."""

    @hookimpl
    def register_metrics_exporter(self):
        return [
            Registration(
                name="lines",
                factory=lambda options, context: JsonLines(Path(options.file)),
                config=LinesOptions,
            ),
            Registration(name="broken", factory=lambda *_: 1 / 0),
        ]


def chosen(*words: str) -> Exporters:
    """What a command line makes of the plugin and the built-in exporter."""
    manager = PluginManager.load(objects={"acme": Plugin()})
    config = compose(parse_overrides(["model=smollm2", *words]))
    manager.check_choices(config)
    context = ExporterContext(model_name="m")
    return make_exporters(manager.table("metrics_exporter"), config.metrics, context, list)


def test_exporters_are_chosen_by_name():
    assert list(chosen().routes) == ["/metrics"]
    assert list(chosen("metrics.exporters=[]").routes) == []
    both = chosen("metrics.exporters=[prometheus,lines]", "metrics.options.lines.file=/tmp/x")
    assert list(both.routes) == ["/metrics"]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["metrics.exporters=[promethius]"], "'promethius'; did you mean 'prometheus'"),
        (["metrics.exporters=[lines]"], "metrics.options.lines.file is not set"),
        (
            ["metrics.exporters=[lines]", "metrics.options.lines.fil=x"],
            "'metrics.options.lines.fil'; did you mean 'file'",
        ),
        (["metrics.options.lines.file=x"], "set metrics.exporters=[prometheus,lines]"),
        (["metrics.exporters=[prometheus,prometheus]"], "names one twice"),
        (["metrics.exporters=[broken]"], "'broken' (from acme) can't be built: ZeroDivisionError"),
        (["metrics.exporters=prometheus"], "a list of text"),
    ],
)
def test_mistakes_in_the_configuration_are_named(words, fragment):
    with pytest.raises((ConfigError, PluginError)) as caught:
        chosen(*words)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("exporter", "fragment"),
    [
        (object(), "neither path, content_type and render, nor interval_s and push"),
        (SimpleNamespace(path="metrics", content_type="a", render=len), "begin with one /"),
        (SimpleNamespace(path="/n/", content_type="a", render=len), "end without"),
        (SimpleNamespace(path=7, content_type="a", render=len), "has the path 7"),
        (SimpleNamespace(interval_s="9", push=len), "interval_s='9'; allowed"),
        (SimpleNamespace(path="/ready", content_type="a", render=len), "'/ready', which is there"),
        (SimpleNamespace(interval_s=0, push=len), "interval_s=0; allowed: at least 0.01"),
        (SimpleNamespace(interval_s=float("nan"), push=len), "interval_s=nan"),
    ],
)
def test_what_is_no_exporter_ends_the_start(exporter, fragment):
    with pytest.raises(PluginError, match="'acme'") as caught:
        Exporters({"acme": exporter}, list)
    assert fragment in str(caught.value)
