"""The hooks of the comm plugins, without torch."""

import subprocess
import sys
from pathlib import Path

from core.settings.config import (
    AppConfig,
    CommConfig,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    PluginChoice,
)
from plugins import comm

ROOT = Path(__file__).parents[3]


def config(backend: str, device: str, nnodes: int = 1) -> AppConfig:
    return AppConfig(
        model=ModelConfig(name="m"),
        comm=CommConfig(tp=PluginChoice(name=backend)),
        engine=EngineConfig(device=device),
        launch=LaunchConfig(nnodes=nnodes),
    )


def test_auto_means_the_device_s_own_backend() -> None:
    one, two = config("auto", "auto"), config("auto", "auto", nnodes=2)
    assert comm.default_backend("comm", "cpu", one) == "gloo"
    assert comm.default_backend("comm", "cuda", one) == "symm_mem"
    assert comm.default_backend("comm", "cuda", two) == "nccl"
    assert comm.default_backend("comm", "tpu", one) is None
    assert comm.default_backend("attention.decode", "cpu", one) is None


def test_nccl_on_cpu_is_a_problem_with_the_key_and_the_remedy() -> None:
    (problem,) = comm.check_plan(config("nccl", "cpu"))
    assert problem.startswith("comm.tp=nccl needs engine.device=cuda")
    assert "set comm.tp=gloo" in problem
    both = AppConfig(
        model=ModelConfig(name="m"),
        comm=CommConfig(tp=PluginChoice(name="gloo"), ep=PluginChoice(name="nccl")),
        engine=EngineConfig(device="cpu"),
    )
    (problem,) = comm.check_plan(both)
    assert problem.startswith("comm.ep=nccl needs")
    assert "set comm.ep=gloo" in problem
    for backend, device in (("nccl", "cuda"), ("gloo", "cpu"), ("auto", "cpu"), ("nccl", "auto")):
        assert comm.check_plan(config(backend, device)) == []


def test_peers_memory_is_of_one_host() -> None:
    assert comm.check_plan(config("symm_mem", "cuda")) == []
    (problem,) = comm.check_plan(config("symm_mem", "cuda", nnodes=2))
    assert problem.startswith("comm.tp=symm_mem connects the GPUs of one host")
    assert problem.endswith("set comm.tp=nccl or comm.tp=auto")
    (problem,) = comm.check_plan(config("symm_mem", "cpu"))
    assert problem.startswith("comm.tp=symm_mem needs engine.device=cuda")


def test_registering_imports_no_torch() -> None:
    code = (
        "import sys, plugins.comm, plugins.parallel, plugins.launchers\n"
        "plugins.comm.register_comm(); plugins.parallel.register_parallel_plan()\n"
        "plugins.launchers.register_launcher()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
