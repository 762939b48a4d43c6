"""The examples pass the contract suites that we ship, run as their authors would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.testing import attention, moe_a2a

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_tests"),
    [
        ("acme_dispatch", 3 * len(moe_a2a.CASES)),
        ("acme_attention", len(attention.CASES)),
        ("acme_sampling", 12),
    ],
)
def test_it_passes_the_contract_by_its_own_tests(name, num_tests, tmp_path):
    example = ROOT / "examples" / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", example / "tests"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{example}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert f"{num_tests} passed" in done.stdout.splitlines()[-1], "no case is left out"
