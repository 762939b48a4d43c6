"""`nodeweave plugins`: what it says of built-in plugins, of third parties' and of overrides."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.plugin.families import FAMILIES
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.plugin.sources import BUILTIN_PLUGINS
from core.plugin_list import to_json, to_text
from core.run import main

ROOT = Path(__file__).parents[2]


@dataclass(slots=True, kw_only=True)
class Options:
    width: int = 1


class Plugin:
    def __init__(self, override=False):
        self.registration = Registration(
            name="gloo", factory="acme:Comm", config=Options, summary="ours", override=override
        )

    @hookimpl
    def register_comm(self):
        return [self.registration]

    @hookimpl
    def check_plan(self, config):
        return []


def loaded(*overrides):
    objects = {f"acme{index}": Plugin(override) for index, override in enumerate(overrides)}
    return PluginManager.load(builtins=(), objects=objects)


def test_a_plugin_its_hooks_and_its_names():
    assert to_text(loaded(False), ["other"]) == (
        f"acme0 (given as an object 0, module {__name__}:Plugin)\n"
        "  hooks: register_comm, check_plan\n"
        "  comm: gloo - ours\n"
        "      options: width\n"
        "\n"
        "other: not loaded (plugins.blocklist)"
    )


def test_what_is_overridden_is_said():
    manager = loaded(False, True)
    assert "comm: gloo - ours (not used: acme1 overrides it)" in to_text(manager, [])
    first, second = json.loads(to_json(manager, []))["plugins"]
    assert first["registrations"][0]["overridden_by"] == "acme1"
    assert second["registrations"] == [
        {
            "family": "comm", "name": "gloo", "summary": "ours", "factory": "acme:Comm",
            "options": ["width"], "for_serving": True, "overridden_by": None,
        }
    ]  # fmt: skip


def test_the_command_lists_every_built_in_name(capsys):
    assert main(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    by_name = {plugin["name"]: plugin for plugin in listed["plugins"]}
    assert set(BUILTIN_PLUGINS) <= set(by_name)
    found = {
        (registration["family"], registration["name"])
        for plugin in by_name.values()
        for registration in plugin["registrations"]
    }
    manager = PluginManager.load()
    assert found == {(family, name) for family in FAMILIES for name in manager.table(family)}
    assert by_name["plugins.launchers"]["distribution"] == "nodeweave"
    assert main(["plugins"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {family}: {name}" in text for family, name in found)


def test_a_blocked_plugin_is_named(capsys):
    assert main(["plugins", "plugins.blocklist=[plugins.launchers]"]) == 0
    text = capsys.readouterr().out
    assert "plugins.launchers: not loaded (plugins.blocklist)" in text
    assert "slurm" not in text


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["engine.seed=3"], "takes plugins.blocklist=[NAME,...] only"),
        (["--jsn"], "`nodeweave plugins --help` shows the flags"),
        (["jsn"], "is not a setting"),
        (["plugins.blocklist=[x]"], "plugins.blocklist names 'x'"),
    ],
)
def test_mistakes(words, fragment, capsys):
    assert main(["plugins", *words]) == 2
    assert fragment in capsys.readouterr().err


def test_help(capsys):
    assert main(["plugins", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: nodeweave plugins")


def test_a_reader_that_has_read_enough_is_no_error():
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = subprocess.run(
        [sys.executable, "-m", "core.run", "plugins"],
        cwd=ROOT, stdout=write_fd, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(write_fd)
    assert (done.returncode, done.stderr) == (0, b"")
