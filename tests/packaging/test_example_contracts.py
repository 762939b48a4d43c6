"""The examples pass the tests that they come with, run as their authors would."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.testing import (
    attention,
    balancer,
    checkpoint_format,
    comm,
    latent_attention,
    moe_a2a,
    tokenizer,
)
from tests.support.third_party import install_example

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_tests"),
    [
        ("acme_dispatch", 3 * len(moe_a2a.CASES)),
        ("acme_attention", len(attention.CASES)),
        ("acme_sampling", 12),
        ("acme_comm", 2 * (len(comm.CASES) + 2)),
        (
            "acme_latent",
            len(latent_attention.CASES) + 3 * len(latent_attention.SMALL),
        ),
        ("acme_model", 6),
        ("acme_checkpoint", len(checkpoint_format.CASES)),
        ("acme_tokenizer", len(tokenizer.CASES) + 1),
        ("acme_launcher", 6),
        ("acme_policy", 3),
        ("acme_metrics", 5),
        ("acme_balancer", 8 + len(balancer.CASES)),
    ],
)
def test_it_passes_the_contract_by_its_own_tests(name, num_tests, tmp_path, monkeypatch):
    install_example(name, tmp_path / "site", monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tests = ROOT / "examples" / name / "tests"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", tests],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert f"{num_tests} passed" in done.stdout.splitlines()[-1], "no case is left out"
