"""What the attention plugins register, choose by default and refuse; none imports torch."""

import subprocess
import sys

import pytest

from core.settings.config import AppConfig, ModelConfig
from plugins.attention import cpu, torch_ref, triton

PLUGINS = [cpu, torch_ref, triton]


def config(device: str, **backends: str) -> AppConfig:
    result = AppConfig(model=ModelConfig(name="test"))
    result.engine.device = device
    for phase, name in backends.items():
        getattr(result.attention, phase).name = name
    return result


def test_each_plugin_registers_its_own_name() -> None:
    names = [item.name for plugin in PLUGINS for item in plugin.register_attention()]
    assert names == ["cpu", "torch_ref", "triton"]
    latent = [item.name for plugin in PLUGINS for item in plugin.register_latent_attention()]
    assert latent == names  # the same keys choose either kind


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["attention", "latent_attention"])
@pytest.mark.parametrize(("device", "expected"), [("cpu", "cpu"), ("cuda", "triton")])
def test_one_plugin_is_the_default_of_each_device(
    kind: str, phase: str, device: str, expected: str
) -> None:
    answers = [plugin.default_backend(f"{kind}.{phase}", device) for plugin in (cpu, triton)]
    assert [answer for answer in answers if answer is not None] == [expected]


@pytest.mark.parametrize("plugin", [cpu, triton])
def test_other_families_are_left_alone(plugin: object) -> None:
    assert plugin.default_backend("comm", "cpu") is None  # type: ignore[attr-defined]
    assert plugin.default_backend("attention.decode", "tpu") is None  # type: ignore[attr-defined]


def test_a_backend_of_the_other_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (problem,) = cpu.check_plan(config("cuda", decode="cpu"))
    assert "attention.decode=cpu" in problem
    assert "engine.device=cuda" in problem
    problems = triton.check_plan(config("cpu", decode="triton", prefill="triton"))
    assert len(problems) == 2
    assert "attention.prefill=triton" in problems[0]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_fitting_choices_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"auto": "auto", "cpu": "cpu", "cuda": "triton"}[device]
    for plugin in (cpu, triton):
        assert list(plugin.check_plan(config(device, prefill=name, decode=name))) == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert list(triton.check_plan(config("cpu", decode="triton"))) == []


def test_discovery_imports_neither_torch_nor_triton() -> None:
    check = (
        "import sys; import plugins.attention.cpu, plugins.attention.torch_ref, "
        "plugins.attention.triton; print('torch' in sys.modules, 'triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
