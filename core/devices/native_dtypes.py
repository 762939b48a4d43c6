"""Which dtypes this machine's CPU multiplies natively, read without importing torch.

oneDNN, which multiplies matrices for torch, takes bfloat16 and float16 on every CPU with AVX-512,
but where the processor has no instructions for them it converts value by value: on a CPU with
AVX-512 and no AVX512_BF16 bfloat16 prompts ran at a quarter of float32's speed. What decides is
oneDNN's instruction set (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html):
what the processor has, at most what ONEDNN_MAX_CPU_ISA allows.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from core.interfaces.launcher import NativeDtypes

# Flags of /proc/cpuinfo, of x86 and of Arm, with which oneDNN has matrix products of a dtype.
_FLAGS = {
    "bfloat16": ("amx_bf16", "avx512_bf16", "bf16"),
    "float16": ("amx_fp16", "avx512_fp16"),
}
# With one of them torch has vectorised products of 4-bit groups
# (core.devices.cpu.cpu_grouped_ints).
_GROUPED_FLAGS = ("avx2", "avx512f")
# Values of ONEDNN_MAX_CPU_ISA that leave a dtype without them; in any case, others mean no limit.
_WITHOUT_BFLOAT16 = frozenset(
    ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
)
_WITHOUT = {
    "bfloat16": _WITHOUT_BFLOAT16,
    "float16": _WITHOUT_BFLOAT16 | {"AVX512_CORE_BF16"},
}
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first that is set holds


def native_dtypes(
    cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ
) -> NativeDtypes:
    """This machine's; none where the system doesn't tell."""
    flags = _flags(cpuinfo)
    limit = next(((name, environment[name]) for name in _LIMITS if environment.get(name)), None)
    native, lacking = {}, {}
    for dtype, wanted in _FLAGS.items():
        has = [flag for flag in wanted if flag in flags]
        if not has:
            lacking[dtype] = f"this CPU has no instructions for it ({', '.join(wanted)})"
        elif limit is not None and limit[1].upper() in _WITHOUT[dtype]:
            lacking[dtype] = f"{'='.join(limit)} forbids the instructions for it ({', '.join(has)})"
        else:
            native[dtype] = has[0]
    grouped = "fma" in flags and not flags.isdisjoint(_GROUPED_FLAGS)
    return NativeDtypes(native=native, lacking=lacking, grouped=grouped)


def _flags(cpuinfo: Path) -> frozenset[str]:
    """The first processor's."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(values.split())
    return frozenset()
