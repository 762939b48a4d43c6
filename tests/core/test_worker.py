"""What a plugin runs beside each rank, in real worker processes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import LLM, SamplingParams
from core.cluster.processes.log_stream import DRAIN_S
from core.cluster.processes.stages import CLEAN_STOP_S, STOP_S
from core.errors import PluginError, ResourceError
from core.plugin.lifespans import CLEAN_LEAVE_S, FAILED_LEAVE_S

SETTINGS: dict[str, Any] = {
    "engine": {"device": "cpu", "kv_cache_tokens": 1024},
    "model.dtype": "float32",
    "model.max_model_len": 64,
    "launch": {"threads_per_worker": 1},
}
Said = Callable[[int], list[dict[str, Any]]]  # what was written of a rank, in order
# Writes what happens to a file; ACME says what goes wrong.
PLUGIN = """
import dataclasses, json, os, sys, threading
from contextlib import contextmanager
from core.plugin.hookspecs import hookimpl

def say(worker, what, **more):
    line = {"what": what, "pid": os.getpid(), **dataclasses.asdict(worker), **more}
    with open(os.environ["ACME_LOG"], "a") as log:
        log.write(json.dumps(line) + "\\n")

@hookimpl
@contextmanager
def worker_lifespan(config, worker):
    import torch.distributed

    todo = os.environ.get("ACME")
    say(worker, "enters", joined=torch.distributed.is_initialized())
    if todo == "fail":
        raise OSError("port 9400 is taken")
    if todo == "hang":
        sys.modules["__main__"].CLEAN_LEAVE_S = 0.1  # core.worker's
    try:
        yield
    except Exception as error:
        say(worker, "is told", error=type(error).__name__)
        raise
    finally:
        say(worker, "leaves")
        if todo == "hang":
            threading.Event().wait()
"""


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    """The plugin installed for child processes; what it wrote, by rank."""
    site = tmp_path / "site"
    info = site / "acme_beside-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_beside.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme_beside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nodeweave]\nacme_beside = acme_beside\n")
    monkeypatch.syspath_prepend(str(site))
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), inherited]))
    monkeypatch.setenv("ACME_LOG", str(tmp_path / "log"))

    def read(rank: int) -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / "log").read_text().splitlines())
        return [line for line in lines if line["rank"] == rank]

    return read


def whats(lines: list[dict[str, Any]]) -> list[str]:
    return [line["what"] for line in lines]


def test_it_lives_as_long_as_each_rank(said: Said, tiny_llama_folder: Path) -> None:
    with LLM(tiny_llama_folder, parallel="tp2", **SETTINGS) as llm:
        [answer] = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(answer.token_ids) == 4
        assert whats(said(0)) == whats(said(1)) == ["enters"]
    assert whats(said(0)) == whats(said(1)) == ["enters", "leaves"]
    first, second = said(0)[0], said(1)[0]
    expected = {"world_size": 2, "dp_rank": 0, "local_ranks": 2, "device": "cpu", "joined": False}
    assert expected.items() <= first.items() & second.items()
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


@pytest.mark.slow
def test_one_that_hangs_at_the_end_holds_nothing_up(
    said: Said, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("ACME", "hang")
    with LLM(tiny_llama_folder, **SETTINGS):
        pass
    assert whats(said(0)) == ["enters", "leaves"]
    printed = capfd.readouterr()
    assert "plugin 'acme_beside' is still in its worker_lifespan after 0.1 s" in printed.err
    assert "did not end when told to" not in printed.out + printed.err


def test_one_that_fails_ends_the_start_by_name(
    said: Said, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME", "fail")
    says = (
        r"plugin 'acme_beside' failed in worker_lifespan: OSError: port 9400 is taken\n.*blocklist"
    )
    with pytest.raises(PluginError, match=says):
        LLM(tiny_llama_folder, **SETTINGS)
    assert whats(said(0)) == ["enters"]


@pytest.mark.slow
def test_it_is_left_where_its_rank_fails(said: Said, tiny_llama_folder: Path) -> None:
    settings = SETTINGS | {"engine": {"device": "cpu", "kv_cache_tokens": 10**13}}
    with pytest.raises(ResourceError):
        LLM(tiny_llama_folder, **settings)
    assert whats(said(0)) == ["enters", "is told", "leaves"]
    assert said(0)[1]["error"] == "ResourceError"


def test_a_clean_end_waits_shorter_than_the_supervisor() -> None:
    assert CLEAN_LEAVE_S + DRAIN_S < CLEAN_STOP_S
    assert FAILED_LEAVE_S < STOP_S
