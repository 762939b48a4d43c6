"""Which dtypes a CPU multiplies, by what its system says; oneDNN itself is the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.devices.native_dtypes import native_dtypes

ROOT = Path(__file__).parents[3]
ZEN4 = "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} avx512_fp16 amx_bf16 amx_tile amx_int8"
GRANITE_RAPIDS = f"{SAPPHIRE_RAPIDS} amx_fp16"
ICE_LAKE = "avx512f avx512bw avx512vl avx512dq avx512_vnni"
MULTIPLY = """
import torch
x = torch.ones(4, 64, dtype=torch.bfloat16)
packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=torch.bfloat16), 16)
torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
"""


def written(folder: Path, flags: str, name: str = "flags\t\t") -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: a CPU: fast\n{name}: fpu {flags} ht\n\n" * 2)
    return path


@pytest.mark.parametrize(
    ("flags", "limit", "native"),
    [
        (ICE_LAKE, "", {}),
        ("avx avx2 avx_ne_convert", "", {}),
        (ZEN4, "", {"bfloat16": "avx512_bf16"}),
        (SAPPHIRE_RAPIDS, "", {"bfloat16": "amx_bf16", "float16": "avx512_fp16"}),
        (GRANITE_RAPIDS, "", {"bfloat16": "amx_bf16", "float16": "amx_fp16"}),
        (ZEN4, "AVX512_CORE_VNNI", {}),
        (ZEN4, "avx512_core", {}),
        (GRANITE_RAPIDS, "AVX2_VNNI_2", {}),
        (ZEN4, "AVX512_CORE_BF16", {"bfloat16": "avx512_bf16"}),
        (SAPPHIRE_RAPIDS, "AVX512_CORE_BF16", {"bfloat16": "amx_bf16"}),
        (ICE_LAKE, "AVX512_CORE_BF16", {}),
        (ZEN4, "ALL", {"bfloat16": "avx512_bf16"}),
        (ZEN4, "no such set", {"bfloat16": "avx512_bf16"}),
    ],
)
def test_a_dtype_is_native_where_cpu_and_limit_allow(
    tmp_path: Path, flags: str, limit: str, native: dict[str, str]
) -> None:
    found = native_dtypes(written(tmp_path, flags), {"ONEDNN_MAX_CPU_ISA": limit})
    assert found.native == native
    assert found.native.keys() | found.lacking.keys() == {"bfloat16", "float16"}


@pytest.mark.parametrize(
    ("flags", "grouped"),
    [("avx2 fma", True), (f"{ICE_LAKE} fma", True), ("avx fma", False), ("asimd bf16", False)],
)
def test_products_of_groups_need_vectors_of_x86(tmp_path: Path, flags: str, grouped: bool) -> None:
    assert native_dtypes(written(tmp_path, flags), {}).grouped == grouped


def test_arm_s_name_for_flags(tmp_path: Path) -> None:
    assert "bfloat16" in native_dtypes(written(tmp_path, "asimd bf16", "Features\t"), {}).native


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert native_dtypes(tmp_path / "nothing", {}).native == {}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, ZEN4)
    lacking = native_dtypes(path, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}).lacking
    assert lacking["bfloat16"] == (
        "DNNL_MAX_CPU_ISA=AVX512_CORE forbids the instructions for it (avx512_bf16)"
    )
    assert lacking["float16"] == ("this CPU has no instructions for it (amx_fp16, avx512_fp16)")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
@pytest.mark.parametrize("limit", ["", "AVX512_CORE_VNNI"])
def test_onednn_agrees(limit: str) -> None:
    """It names its instruction set when it is told to be verbose."""
    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch's oneDNN takes no bfloat16 here")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit, "ONEDNN_VERBOSE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", MULTIPLY],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    (isa,) = [line.split("isa:")[1] for line in said.splitlines() if "info,cpu,isa:" in line]
    (kernel,) = [line for line in said.splitlines() if ",exec,cpu,inner_product," in line]
    is_native = "bfloat16" in native_dtypes(environment=environment).native
    assert is_native == ("bfloat16" in isa), isa
    assert is_native == ("gemm:jit" not in kernel), kernel
