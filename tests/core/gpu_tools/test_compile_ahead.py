"""Kernels compiled in a rehearsal are those that steps meet, and lie where nobody else writes."""

import os
import stat
from pathlib import Path

import pytest

from core.errors import ResourceError
from tests.support.hopper import run_for_hopper

pytest.importorskip("triton")

from core.gpu_tools.compile_ahead import CACHE_VARIABLE, keep_kernels_in

SCRIPT = """
from core.gpu_tools.compile_ahead import counted_compilations, rehearsal
from core.devices.cuda.triton_ops import TritonOps

ops, told = TritonOps(), []
x_TE = torch.randn(32, 256, dtype=torch.bfloat16)

def steps():
    for num_rows in (1, 7, 32):
        normed = ops.rms_norm(x_TE[:num_rows], x_TE[0], 1e-5)
        assert not normed.any(), "what no kernel wrote is zeros"
        ops.silu_and_mul(x_TE[:num_rows])

with counted_compilations() as names:
    with rehearsal(CPU, lambda *progress: told.append(progress), 2):
        steps()
    first = len(names)
    with rehearsal(CPU, lambda *progress: told.append(progress), 2):
        steps()
assert {"rms_norm_kernel", "silu_and_mul_kernel"} <= set(names), names
assert len(names) == first, names
assert (first, first) in told, told
from triton.compiler import CompiledKernel
from core.devices.cuda.triton_kernels import rms_norm_kernel
ready = list(rms_norm_kernel.device_caches[0][0].values())
assert ready
assert all(isinstance(kernel, CompiledKernel) for kernel in ready), ready
try:
    with rehearsal(CPU, lambda *_: None):
        raise KeyError("step")
except KeyError:
    pass
from triton.runtime.jit import JITFunction
assert JITFunction.run.__name__ == "run"
print("compiled", first)
"""


def test_a_rehearsal_compiles_what_is_launched_once(tmp_path: Path) -> None:
    assert run_for_hopper(SCRIPT, tmp_path).startswith("compiled ")
    assert any(tmp_path.rglob("*.cubin"))


def test_kernels_are_kept_in_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    folder = tmp_path / "new" / "kernels"
    keep_kernels_in(folder)
    assert os.environ[CACHE_VARIABLE] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_a_folder_that_everyone_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "as it was")
    tmp_path.chmod(0o777)
    with pytest.raises(ResourceError, match=r"engine\.kernel_cache_dir=.*written by everyone"):
        keep_kernels_in(tmp_path)
    assert os.environ[CACHE_VARIABLE] == "as it was"
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"set engine\.kernel_cache_dir"):
        keep_kernels_in(tmp_path / "file")
