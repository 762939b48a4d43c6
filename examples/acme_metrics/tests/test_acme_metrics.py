"""The exporter of the installed package: chosen by its name, and what it writes."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.interfaces.metrics import (
    ExporterContext,
    Histogram,
    MetricFamily,
    Point,
    PushExporter,
    ScrapeExporter,
)
from core.plugin.plugin_manager import PluginManager
from core.settings.choice import PluginChoice
from core.settings.compose import compose, parse_overrides

SECONDS = Histogram(("m",), (1.0,), (2, 0), 0.5)
FAMILIES = [
    MetricFamily("n_running", "gauge", "Running.", ("model_name",), [Point(("m",), 3.0)]),
    MetricFamily("n_s", "histogram", "Seconds.", ("model_name",), (), [SECONDS]),
]


def made(*words: str) -> object:
    """What a command line makes of it."""
    plugins = PluginManager.load()
    config = compose(parse_overrides(["model=smollm2", "metrics.exporters=[acme]", *words]))
    plugins.check_choices(config)
    choice = PluginChoice(name="acme", options=config.metrics.options["acme"])
    context = ExporterContext(model_name="smollm2")
    return plugins.table("metrics_exporter").create(choice, context)


def test_each_push_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    exporter = made(f"metrics.options.acme.file={file}", "metrics.options.acme.interval_s=0.5")
    assert isinstance(exporter, PushExporter)
    assert not isinstance(exporter, ScrapeExporter)
    assert exporter.interval_s == 0.5
    for _ in range(2):
        exporter.push(FAMILIES)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["model"] for line in lines] == ["smollm2"] * 2
    running, seconds = lines[1]["families"]
    assert running["points"] == [{"labels": ["m"], "value": 3.0}]
    assert seconds["histograms"] == [
        {"labels": ["m"], "bounds": [1.0], "counts": [2, 0], "total": 0.5}
    ]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    exporter = made(f"metrics.options.acme.file={tmp_path}/none/metrics.jsonl")
    assert isinstance(exporter, PushExporter)
    with pytest.raises(FileNotFoundError):
        exporter.push(FAMILIES)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["metrics.options.acme={}"], r"metrics\.options\.acme\.file is not set"),
        (
            ["metrics.options.acme.file=x", "metrics.options.acme.interval_s=0"],
            r"metrics\.options\.acme: interval_s=0\.0 is out of range",
        ),
        (["metrics.options.acme.files=x"], r"'metrics\.options\.acme\.files'; did you mean 'file'"),
    ],
)
def test_mistakes_are_named(words: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        made(*words)
