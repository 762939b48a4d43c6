"""What the machine offers, against what the system and torch say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.cluster.processes.machine import find_machine, usable_cpus
from core.errors import ResourceError

ROOT = Path(__file__).parents[4]


def test_cpus_are_those_of_the_affinity_cut_to_the_quota(tmp_path: Path) -> None:
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    assert usable_cpus(tmp_path) == allowed
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(tmp_path) == allowed
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cpus(tmp_path) == allowed[:1]
    (tmp_path / "cpu.max").write_text("1000 100000\n")
    assert usable_cpus(tmp_path) == allowed[:1]


def test_devices_are_those_torch_sees() -> None:
    import torch

    machine = find_machine("auto")
    assert machine.num_devices == torch.cuda.device_count()
    assert machine.device == ("cuda" if machine.num_devices else "cpu")
    assert find_machine("cpu").num_devices == 0
    if not machine.num_devices:
        with pytest.raises(ResourceError, match=r"engine.device=cuda: .*set engine.device=cpu"):
            find_machine("cuda")


def test_hidden_devices_are_not_counted() -> None:
    code = (
        "from core.cluster.processes.machine import find_machine\n"
        "print(find_machine('auto').device)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        check=True,
    ).stdout
    assert output == b"cpu\n"


def test_the_supervisor_s_side_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "import core.cluster.nodes.endpoints\n"
        "import core.cluster.processes.supervisor, core.cluster.processes.display\n"
        "from core.cluster.processes.machine import find_machine\n"
        "find_machine('auto')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
