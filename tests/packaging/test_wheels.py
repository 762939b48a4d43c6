"""The built wheels, ours and the examples', in a clean environment away from the checkout.

The environment is a fresh venv that sees this one's dependencies through a path entry; path
entries found that way are not followed, so an editable install of the checkout stays out.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.server import running_server

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("acme_*"))


@dataclass(frozen=True)
class Installation:
    """A clean environment with the wheels, and a folder without sources to run in."""

    bin: Path
    site: Path
    work: Path

    def run(self, program: str, *words: str, **environment: str):
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NODEWEAVE"))}
        return subprocess.run(
            [self.bin / program, *words],
            cwd=self.work,
            env={**keep, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def compose(self, *words: str):
        return self.run("python", "-m", "core.run", "+model=smollm2", *words, "--cfg", "job")


def build_wheel(source: Path, copied: Path, target: Path) -> Path:
    """Build from a copy, so that nothing is written into the checkout. Uses no network."""
    unpacked = shutil.ignore_patterns("__pycache__", ".*", "tests", "benchmarks", "dist")
    shutil.copytree(source, copied, ignore=unpacked)
    shutil.rmtree(copied / "build", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", target, copied],
        check=True,
        capture_output=True,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("wheels")
    sources = {"nodeweave": ROOT} | {path.name: path for path in EXAMPLES}
    return {
        name: build_wheel(source, place / "source" / name, place / name)
        for name, source in sources.items()
    }


@pytest.fixture(scope="module")
def make_installation(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Installation]:
    def make(*wheels: Path) -> Installation:
        place = tmp_path_factory.mktemp("clean")
        venv.create(place / "venv", symlinks=True)
        inside = {"base": str(place / "venv"), "platbase": str(place / "venv")}
        site = Path(sysconfig.get_path("purelib", vars=inside))
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (place / "work").mkdir()
        installation = Installation(place / "venv/bin", site, place / "work")
        flags = ["--no-deps", "--no-index", "--ignore-installed", "-q"]
        done = installation.run("python", "-m", "pip", "install", *flags, *map(str, wheels))
        assert done.returncode == 0, done.stderr
        return installation

    return make


@pytest.fixture(scope="module")
def installed(wheels, make_installation) -> Installation:
    return make_installation(*wheels.values())


def test_the_wheel_holds_code_and_configs_and_nothing_else(wheels):
    names = zipfile.ZipFile(wheels["nodeweave"]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"core", "plugins", "conf"}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs <= set(names)
    modules = {
        str(path.relative_to(ROOT))
        for top in ("core", "plugins")
        for path in (ROOT / top).rglob("*.py")
    }
    assert modules <= set(names)
    assert {"core/py.typed", "plugins/py.typed"} <= set(names)
    [license_name] = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    with zipfile.ZipFile(wheels["nodeweave"]) as wheel:
        assert wheel.read(license_name) == (ROOT / "LICENSE").read_bytes()


def test_the_installed_code_runs_not_the_checkout(installed):
    code = "import core, plugins, conf, acme_attention as a; print(core, plugins, conf, a)"
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed.site)) == 4
    assert f"'{ROOT}/" not in done.stdout


def test_the_console_script_answers(installed):
    done = installed.run("nodeweave", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "nodeweave")


def test_installed_plugins_are_listed_with_where_they_come_from(installed):
    done = installed.run("nodeweave", "plugins", "--json")
    assert done.returncode == 0, done.stderr
    plugins = {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    acme = plugins["acme_attention"]
    assert (acme["distribution"], acme["version"]) == ("acme-attention", "0.3.0")
    assert acme["module"] == "acme_attention"
    assert acme["hooks"] == ["register_attention", "config_searchpath"]
    [registration] = acme["registrations"]
    assert (registration["family"], registration["name"]) == ("attention", "acme")
    assert registration["options"] == ["query_block"]
    assert plugins["acme_plan"]["registrations"][0]["family"] == "parallel_plan"
    assert plugins["acme_sampling"]["registrations"][0]["name"] == "no_repeat_ngram"
    assert plugins["acme_balancer"]["registrations"][0]["options"] == [
        "num_blocks",
        "most_over_mean",
    ]


def test_the_third_party_backend_is_selected_by_name(installed):
    done = installed.compose("attention=acme", "attention.decode.options.query_block=8")
    assert done.returncode == 0, done.stderr
    attention = yaml.safe_load(done.stdout)["attention"]
    assert attention["prefill"] == {"name": "acme", "options": {"query_block": 256}}
    assert attention["decode"] == {"name": "acme", "options": {"query_block": 8}}


def test_the_third_party_dispatcher_is_selected_by_name(installed):
    done = installed.compose("moe_a2a=acme")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["moe_a2a"]["decode"] == {"name": "acme", "options": {}}


def test_the_third_party_frontend_is_selected_by_name(installed):
    done = installed.compose("frontend=acme", "frontend.options.default_max_tokens=8")
    assert done.returncode == 0, done.stderr
    frontend = yaml.safe_load(done.stdout)["frontend"]
    assert (frontend["name"], frontend["port"]) == ("acme", 30000)
    assert frontend["options"] == {"default_max_tokens": 8}


def test_the_third_party_plan_is_selected_by_name(installed):
    done = installed.compose("parallel=acme", "parallel.tp=8", "parallel.options.attention_ranks=4")
    assert done.returncode == 0, done.stderr
    parallel = yaml.safe_load(done.stdout)["parallel"]
    assert (parallel["plan"], parallel["tp"]) == ("acme", 8)
    assert parallel["options"] == {"attention_ranks": 4}
    done = installed.compose("parallel=acme", "parallel.tp=8", "parallel.options.attention_ranks=3")
    assert done.returncode == 2
    assert "parallel.options.attention_ranks=3 does not divide parallel.tp=8" in done.stderr


def test_every_example_is_loaded_and_registers_something(installed):
    done = installed.run("nodeweave", "plugins", "--json")
    plugins = {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    assert len(EXAMPLES) > 10
    for example in EXAMPLES:
        plugin = plugins[example.name]
        assert plugin["distribution"] == example.name.replace("_", "-")
        assert plugin["registrations"]
    rules = [each["family"] for each in plugins["acme_policy"]["registrations"]]
    assert rules == ["acme_rule", "acme_rule"]


def test_their_groups_sections_and_commands_are_there(installed):
    words = ["comm=acme", "launch=acme", "acme.rule.name=small", "acme.rule.options.most_ranks=2"]
    words += ["model.load_format=npy", "model.tokenizer_mode=ranks"]
    done = installed.compose(*words)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert [config["comm"]["tp"]["name"], config["launch"]["name"]] == ["acme", "acme"]
    assert config["acme"]["rule"] == {"name": "small", "options": {"most_ranks": 2}}
    done = installed.compose(*words, "parallel.tp=3")
    assert (done.returncode, "parallel.tp=3 is more than 2 ranks" in done.stderr) == (2, True)
    done = installed.run("nodeweave", "rules")
    assert (done.returncode, done.stdout.split()[0]) == (0, "anything")


@pytest.mark.slow
def test_the_installed_server_computes_with_it(installed, tiny_llama_folder):
    """Greedy answers are those of the oracle backend, asked of two servers."""
    answers = []
    for backend in ("acme", "torch_ref"):
        with running_server(
            "+model=custom",
            f"model.path={tiny_llama_folder}",
            f"attention={backend}",
            python=installed.bin / "python",
            folder=installed.work,
        ) as server:
            info = httpx.get(f"{server.url}/server_info").json()
            assert backend in json.dumps(info)
            body = {"model": "llama", "prompt": [5, 6, 7, 8], "max_tokens": 24, "temperature": 0}
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"])
            assert server.stop() == 0
    assert answers[0] == answers[1]


def test_help_and_completion_know_it(installed):
    assert "acme" in installed.run("nodeweave", "--help").stdout
    line = "nodeweave +model=smollm2 attention=ac"
    done = installed.run(
        "nodeweave", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))
    )
    assert done.stdout.split() == ["attention=acme"]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (
            ["attention=acme", "attention.decode.options.query_blok=8"],
            ["attention.decode.options.query_blok", "did you mean 'query_block'?"],
        ),
        (
            ["attention=acme", "attention.decode.options.query_block=x"],
            ["attention.decode.options.query_block='x'", "expected an integer"],
        ),
        (
            ["attention=acme", "attention.prefill.options.query_block=0"],
            ["attention.prefill.options: query_block=0", "at least 1"],
        ),
        (
            ["attention=acme", "plugins.blocklist=[acme_attention]"],
            ["attention=acme", "torch_ref"],
        ),
    ],
)
def test_its_mistakes_are_reported_like_ours(installed, words, fragments):
    done = installed.compose(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_without_the_plugin_the_name_is_unknown(wheels, make_installation):
    done = make_installation(wheels["nodeweave"]).compose("attention=acme")
    assert done.returncode == 2
    assert "attention=acme" in done.stderr
    assert "torch_ref" in done.stderr
