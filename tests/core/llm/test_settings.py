"""Python values as settings: the same configuration as the command line's words, or one error."""

from pathlib import Path

import pytest

from core.errors import ConfigError
from core.llm.settings import configure
from core.settings.compose import compose, parse_overrides

SAME = [
    ({}, []),
    ({"parallel": "tp2", "attention": "torch_ref"}, ["parallel=tp2", "attention=torch_ref"]),
    ({"attention@attention.decode": "cpu"}, ["attention@attention.decode=cpu"]),
    ({"engine": {"page_size": 32, "mem_fraction": 0.5}},
     ["engine.page_size=32", "engine.mem_fraction=0.5"]),
    ({"engine.page_size": None, "engine.disable_prefix_cache": True},
     ["engine.page_size=null", "engine.disable_prefix_cache=true"]),
    ({"model.served_name": "a 'b' \\ \"c\" = [x], {y}"},
     ['model.served_name="a \'b\' \\ \\"c\\" = [x], {y}"']),
    ({"model.served_name": "true"}, ["model.served_name='true'"]),
    ({"model": {"default_sampling": {"temperature": 0.5, "top_k": 1e-5}}},
     ["model.default_sampling={temperature: 0.5, top_k: 0.00001}"]),
    ({"frontend": {"cors_origins": ["http://a:1", "http://b:2"]}},
     ["frontend.cors_origins=[http://a:1,http://b:2]"]),
    ({"frontend.api_key_file": Path("/a/b")}, ["frontend.api_key_file=/a/b"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), SAME)
def test_the_same_as_on_the_command_line(settings, words):
    model = settings.pop("model", {})  # the name of LLM's first argument
    settings |= {f"model.{key}": value for key, value in model.items()}
    config, _, _ = configure("smollm2", settings)
    assert config == compose(parse_overrides(["+model=smollm2", *words]))


def test_folders_files_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for model in ("here", "./there", "owner/name", "x.gguf", tmp_path):
        config, _, _ = configure(model, {})
        assert config.model.path == str(model)
    assert configure("custom", {"model.path": "owner/name"})[0].model.path == "owner/name"


@pytest.mark.parametrize(
    ("model", "settings", "fragments"),
    [
        ("smolm2", {}, ["model='smolm2'", "did you mean 'smollm2'?", "owner/name"]),
        ("", {}, ["model=''"]),
        (7, {}, ["model is int"]),
        ("smollm2", {"engine.seed": object()}, ["engine.seed is object", "allowed: text, numbers"]),
        ("smollm2", {"engine": {"page_size": "x"}}, ["engine.page_size='x'", "an integer"]),
        ("smollm2", {"page_size": 3}, ["did you mean engine.page_size?"]),
        ("smollm2", {"parallel": "tp3"}, ["parallel=tp3", "parallel.tp=N"]),
        ("smollm2", {"parallel": {"ep": 2}}, ["parallel.ep"]),
        ("smollm2", {"launch": "ray"}, ["one machine", "python -m core.run"]),
        ("smollm2", {"comm": "emulated"}, ["emulated is for timing"]),
        ("smollm2", {"plugins": {"blocklist": ["x"]}}, ["plugins.blocklist names 'x'"]),
    ],
)
def test_what_is_refused(model, settings, fragments):
    with pytest.raises(ConfigError) as caught:
        configure(model, settings)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_several_nodes_are_refused(monkeypatch):
    monkeypatch.setenv("NODEWEAVE_CLUSTER_TOKEN", "00" * 32)
    launch = {"nnodes": 2, "dist_init_addr": "127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"launch.nnodes=2 .*python -m core.run"):
        configure("smollm2", {"launch": launch, "parallel": "tp2"})
