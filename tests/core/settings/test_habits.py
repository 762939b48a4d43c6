"""Command lines of other servers: what is answered can be typed, and means the same."""

import shlex
from pathlib import Path

import pytest

from core.settings.catalog import Catalog
from core.settings.compose import compose, parse_overrides
from core.settings.config import AppConfig
from core.settings.habits import (
    KEYS,
    MODEL_FLAGS,
    NOTES,
    SWITCHES,
    correction,
    is_ours,
    preset_like,
    setting,
)
from core.settings.schema import knobs

ROOT = Path(__file__).parents[3]
GROUPS = Catalog([]).groups
SMOL = "+model=smollm2"


def typed(answer):
    """The words of the line that an answer tells to type."""
    (line,) = [line for line in answer.splitlines() if line.startswith("  ")]
    return shlex.split(line)[1:]


LINES = [  # (a line as other servers have it, what to type here)
    ("--model x --port 8000", "+model=custom model.path=x frontend.port=8000"),
    ("--model-path=Qwen/Qwen3-8B --tp 2", "+model=custom model.path=Qwen/Qwen3-8B parallel.tp=2"),
    ("serve Qwen/Qwen3-8B -tp 2 --host ::1",
     "+model=custom model.path=Qwen/Qwen3-8B parallel.tp=2 frontend.host=::1"),
    ("--served_model_name 'my model' --model smollm2",
     "+model=smollm2 'model.served_name=\"my model\"'"),
    ("--max-model-len 4096 --gpu-memory-utilization=0.9 --model smollm2",
     "+model=smollm2 model.max_model_len=4096 engine.mem_fraction=0.9"),
    ("--enforce-eager --no-enable-prefix-caching --model smollm2 --cfg job",
     "+model=smollm2 engine.cuda_graphs=off engine.disable_prefix_cache=true --cfg job"),
    (f"{SMOL} engine.page_size = 32", f"{SMOL} engine.page_size=32"),
    (f"{SMOL} engine.page_size= 32 frontend.port =1",
     f"{SMOL} engine.page_size=32 frontend.port=1"),
    ("+model = smollm2 attention@attention.decode = cpu",
     f"{SMOL} attention@attention.decode=cpu"),
    ("smollm2", SMOL),
    ("model smollm2 parallel tp2", f"{SMOL} parallel=tp2"),
    ("./my.gguf", "+model=custom model.path=./my.gguf"),
    ("--frontend.port 80 +model=smollm2", f"frontend.port=80 {SMOL}"),
    (f"{SMOL} --dtype bfloat16", f"{SMOL} model.dtype=bfloat16"),
    ("-m /x.gguf --port 1", "+model=custom model.path=/x.gguf frontend.port=1"),
    ("--model '/a b/c(1)'", "+model=custom 'model.path=\"/a b/c(1)\"'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), LINES)
def test_the_line_to_type_composes(words, expected):
    words = shlex.split(words)
    assert not is_ours(words)
    right = typed(correction(words, GROUPS))
    assert right == shlex.split(expected)
    assert is_ours(right)
    settings = [word for word in right if word not in ("--cfg", "job")]
    assert isinstance(compose(parse_overrides(settings)), AppConfig)


@pytest.mark.parametrize(
    "words",
    [[], [SMOL], ["model=smollm2", "engine.page_size=8"], [SMOL, "--cfg", "job"], ["-h"],
     ["--config-dir", "/x", SMOL], ["--cfg=job"], ["-sc", "install=bash"], ["~parallel"],
     ["model.served_name=", SMOL], [SMOL, "-m"], ["model.path=my model"]],
)  # fmt: skip
def test_lines_of_ours_are_left_alone(words):
    assert is_ours(words)


def test_every_key_of_the_table_is_one():
    known = {knob.key for knob in knobs(AppConfig)} | set(GROUPS)
    words = [*KEYS.values(), *(word.partition("=")[0] for word in SWITCHES.values())]
    assert set(words) <= known
    assert not set(KEYS) & set(NOTES)
    assert not set(KEYS) & set(MODEL_FLAGS)


def test_flags_without_a_key_say_what_to_know_and_never_repeat_a_secret():
    line = ["--model", "x", "--api-key", "hunter2", "--trust-remote-code", "--pp=2", "--foo", "3"]
    answer = correction([*line, "--tensor-paralel-size", "2"], GROUPS)
    assert typed(answer) == ["+model=custom", "model.path=x"]
    assert "hunter2" not in answer
    for fragment in (
        "frontend.api_key_file=FILE",
        "a model's own code is never run",
        "--foo: no setting is known by this name\n",
        "--tensor-paralel-size: no setting is known by this name; did you mean "
        "'tensor-parallel-size'?",
    ):
        assert fragment in answer


def test_a_model_is_asked_for_where_none_is_named():
    assert typed(correction(["serve"], GROUPS)) == ["+model=NAME"]
    assert typed(correction(["--port"], GROUPS)) == ["+model=NAME", "frontend.port=VALUE"]
    assert typed(correction(["help"], GROUPS)) == ["--help"]
    assert typed(correction([""], GROUPS)) == ["+model=NAME"]


@pytest.mark.parametrize(
    ("name", "preset"),
    [("Qwen/Qwen3-8B", "qwen3_8b"), ("deepseek-ai/DeepSeek-V3", "deepseek_v3"), ("a/b", None)],
)
def test_presets_of_hub_ids(name, preset):
    assert preset_like(name, GROUPS["model"]) == preset


@pytest.mark.parametrize(
    "value", ["a b", "it's", 'say "x"', "a\\b", "x(1)", "a,b", "[x", "é", "\\", 'a\\"b', "a\\\\"]
)
def test_a_quoted_setting_is_read_as_it_was_meant(value):
    (word,) = shlex.split(setting("model.path", value))
    (override,) = parse_overrides([word])
    assert override.value == value


def test_the_documentation_has_every_flag():
    text = (ROOT / "docs/configuration.md").read_text()
    section = text.partition("## Flags of vLLM and SGLang")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if "`" in line]
    rows = {
        flag: row[1].strip("`") for row in cells if len(row) == 2 for flag in row[0].split(", ")
    }
    assert rows == KEYS | SWITCHES
