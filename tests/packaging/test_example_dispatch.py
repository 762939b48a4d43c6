"""The example's dispatcher passes the contract suite that we ship, run as its author would."""

import os
import subprocess
import sys
from pathlib import Path

from core.testing.moe_a2a import CASES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/acme_dispatch"


def test_it_passes_the_contract_by_its_own_tests(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", EXAMPLE / "tests"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{EXAMPLE}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert f"{3 * len(CASES)} passed" in last, "no case is left out"
