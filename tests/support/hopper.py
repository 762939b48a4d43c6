"""Compiling for Hopper without a GPU, in a process of its own: Triton has one driver, and chooses
between interpreter and compiler when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BEGIN = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Named:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Named())
CPU = torch.device("cpu")
"""


def run_for_hopper(script: str, cache: Path) -> str:
    """What a script prints whose Triton launches on CPU tensors are Hopper's; they can be compiled
    (core.gpu_tools.compile_ahead.rehearsal), and not run. Kernels are kept in `cache`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BEGIN + script],
        env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
