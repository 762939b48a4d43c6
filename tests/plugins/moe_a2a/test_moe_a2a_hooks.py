"""The hooks of the all-to-all plugins, without torch."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.settings.config import (
    AppConfig,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    MoEAllToAllConfig,
    ParallelConfig,
    PluginChoice,
)
from plugins import moe_a2a
from plugins.moe_a2a._options import AllGatherOptions, DeepEPOptions

ROOT = Path(__file__).parents[3]
DEEPSEEK = {"hidden_size": 7168, "num_experts_per_tok": 8}


def config(
    prefill: str = "auto",
    decode: str = "auto",
    *,
    ep: int = 8,
    dp: int = 1,
    device: str = "cuda",
    nnodes: int = 1,
    dtype: str = "bfloat16",
    shape: dict | None = None,
) -> AppConfig:
    return AppConfig(
        model=ModelConfig(name="m", dtype=dtype, shape=shape),
        parallel=ParallelConfig(tp=ep, ep=ep, dp_attention=dp),
        moe_a2a=MoEAllToAllConfig(
            prefill=PluginChoice(name=prefill), decode=PluginChoice(name=decode)
        ),
        engine=EngineConfig(device=device),
        launch=LaunchConfig(nnodes=nnodes),
    )


@pytest.fixture
def with_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is there, as far as anyone can tell without importing it."""
    real = importlib.util.find_spec
    found = importlib.machinery.ModuleSpec("deep_ep", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "deep_ep" else real(name)
    )


def test_auto_without_the_package() -> None:
    if importlib.util.find_spec("deep_ep") is not None:
        pytest.skip("deep_ep is installed")
    one, two = config(), config(nnodes=2)
    for phase in ("prefill", "decode"):
        assert moe_a2a.default_backend(f"moe_a2a.{phase}", "cpu", one) == "nccl"
        assert moe_a2a.default_backend(f"moe_a2a.{phase}", "cuda", one) == "allgather"
        assert moe_a2a.default_backend(f"moe_a2a.{phase}", "cuda", two) == "nccl"
        assert moe_a2a.default_backend(f"moe_a2a.{phase}", "tpu", one) is None
    assert moe_a2a.default_backend("comm", "cpu", one) is None


@pytest.mark.usefixtures("with_deep_ep")
def test_auto_is_deepep_on_gpus_with_the_package() -> None:
    assert moe_a2a.default_backend("moe_a2a.decode", "cuda", config()) == "deepep"
    assert moe_a2a.default_backend("moe_a2a.decode", "cpu", config()) == "nccl"


def test_local_needs_ranks_that_have_the_same_rows() -> None:
    assert not moe_a2a.check_plan(config("local", "local", ep=1))
    assert not moe_a2a.check_plan(config("local", "local", ep=4))
    assert not moe_a2a.check_plan(config("local", "auto", ep=4))
    problems = moe_a2a.check_plan(config("local", "local", ep=4, dp=2))
    assert [problem.split(" ")[0] for problem in problems] == [
        "moe_a2a.prefill=local",
        "moe_a2a.decode=local",
    ]
    assert "parallel.dp_attention=2 and parallel.ep=4 ranks have rows" in problems[0]
    assert problems[0].endswith("set moe_a2a.prefill=auto")


def test_local_in_one_phase_alone_is_a_problem() -> None:
    (problem,) = moe_a2a.check_plan(config("local", "nccl", ep=4))
    assert "moe_a2a.prefill=local" in problem
    assert problem.endswith("set moe_a2a=local or moe_a2a=nccl")
    (problem,) = moe_a2a.check_plan(config("nccl", "local", ep=4))
    assert problem.startswith("moe_a2a.decode=local")


@pytest.mark.parametrize("name", ["nccl", "allgather"])
def test_collectives_do_for_any_number_of_ranks(name: str) -> None:
    for ep in (1, 2, 8):
        assert not moe_a2a.check_plan(config(name, name, ep=ep, device="cpu"))


def test_deepep_on_a_cpu_is_a_problem() -> None:
    (problem,) = moe_a2a.check_plan(config("deepep", device="cpu"))
    assert problem.startswith("moe_a2a.prefill=deepep needs engine.device=cuda, but it is 'cpu'")
    assert problem.endswith("set moe_a2a.prefill=nccl")


def test_deepep_without_the_package_names_the_extra() -> None:
    if importlib.util.find_spec("deep_ep") is not None:
        pytest.skip("deep_ep is installed")
    (problem,) = moe_a2a.check_plan(config(decode="deepep"))
    assert problem.startswith("moe_a2a.decode=deepep needs the package deep_ep")
    assert "pip install 'nodeweave[deepep]'" in problem


@pytest.mark.usefixtures("with_deep_ep")
@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (config("deepep", "deepep", shape=DEEPSEEK), []),
        (config("deepep", "deepep", ep=16, nnodes=2, shape=DEEPSEEK), []),
        (config("deepep", ep=16, nnodes=4), ["launch.nnodes=4 needs parallel.ep=32"]),
        (config("deepep", ep=6), ["does not connect parallel.ep=6 ranks; allowed: 2, 4, 8, 16"]),
        (config(decode="deepep", ep=6), []),
        (config("deepep", "deepep", ep=1), ["prefill=deepep needs parallel.ep", "decode=deepep"]),
        (
            config("deepep", "deepep", dtype="float16"),
            ["prefill=deepep carries bfloat16 rows", "decode=deepep carries bfloat16 rows"],
        ),
        (
            config("deepep", "deepep", shape=DEEPSEEK | {"hidden_size": 1000}),
            ["multiple of 128, but the model's is 1000", "no kernel for the model's hidden size"],
        ),
        (config(decode="deepep", shape=DEEPSEEK | {"hidden_size": 3072}), ["size of 3072"]),
        (config(decode="deepep", shape=DEEPSEEK | {"num_experts_per_tok": 12}), ["at most 11"]),
        (config("deepep", shape=DEEPSEEK | {"num_experts_per_tok": 33}), ["at most 32"]),
    ],
)
def test_what_deepep_can_not_do_is_said_before_anything_starts(
    given: AppConfig, fragments: list[str]
) -> None:
    problems = moe_a2a.check_plan(given)
    assert len(problems) == len(fragments), problems
    for problem, fragment in zip(problems, fragments, strict=True):
        assert fragment in problem
        assert problem.startswith("moe_a2a.")
        assert "set moe_a2a." in problem, "a way out"


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (lambda: AllGatherOptions(layout="diagonal"), "allowed: routed, contiguous, batched"),
        (lambda: DeepEPOptions(num_sms=7), "an even number"),
        (lambda: DeepEPOptions(num_sms=0), "at least 2"),
        (lambda: DeepEPOptions(low_latency_max_rows=1025), "allowed: 1 to 1024"),
        (lambda: DeepEPOptions(low_latency_max_rows=0), "allowed: 1 to 1024"),
    ],
)
def test_wrong_options_are_refused(options, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        options()


def test_every_plugin_has_a_config_of_its_name() -> None:
    names = {registration.name for registration in moe_a2a.register_moe_a2a()}
    files = {path.stem for path in (ROOT / "conf/moe_a2a").glob("*.yaml")}
    assert files == names | {"auto"}


def test_registering_imports_no_torch() -> None:
    code = (
        "import sys, plugins.moe_a2a\n"
        "plugins.moe_a2a.register_moe_a2a(); plugins.moe_a2a.default_backend('comm', 'cpu', None)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_symm_mem_is_for_the_gpus_of_one_host() -> None:
    assert moe_a2a.check_plan(config("symm_mem", "symm_mem")) == []
    (problem,) = moe_a2a.check_plan(config(decode="symm_mem", nnodes=2))
    assert problem.startswith("moe_a2a.decode=symm_mem connects the GPUs of one host")
    (problem,) = moe_a2a.check_plan(config("symm_mem", device="cpu"))
    assert problem.startswith("moe_a2a.prefill=symm_mem needs engine.device=cuda")
