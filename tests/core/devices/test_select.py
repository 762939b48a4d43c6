"""Which operations a device gets, and what choosing them imports."""

import subprocess
import sys

CHECK = """
import sys
import torch
from core.devices.select import select_ops
print(type(select_ops(torch.device("cpu"))).__name__, "triton" in sys.modules)
print(type(select_ops(torch.device("cuda"))).__name__, "triton" in sys.modules)
"""


def test_each_device_gets_its_operations_and_the_cpu_needs_no_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["CpuOps False", "TritonOps True"]
