"""Meshes: groups of real gloo ranks, ranks that never come, and one rank alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ResourceError
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan

ROOT = Path(__file__).parents[3]

# Each rank is called upon by a stranger, sums its own number over every axis and prints what it
# got, and who shares groups.
RANK = """
import json, os, socket, sys
import psutil
import torch, torch.distributed as dist
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
torch.set_num_threads(1)
plan = Plan(dp=2, tp_attn=2, ep=4)
rank = int(sys.argv[1])
mesh = open_mesh(plan, rank, torch_backends=dict.fromkeys(("tp", "dp", "ep", "pp"), "gloo"),
                 rendezvous=sys.argv[2], timeout_s=60)
ports = [c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
refused = 0
for port in ports:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
    except TimeoutError:
        refused += 1
sums = {}
for axis in ("tp", "dp", "ep"):
    x = torch.tensor([10 ** rank])
    dist.all_reduce(x, group=mesh.group(axis))
    sums[axis] = int(x)
ep_is_world = mesh.group("ep") is dist.group.WORLD
print(json.dumps({"sums": sums, "pp": mesh.group("pp") is None, "ep_is_world": ep_is_world,
                  "ports": len(ports), "refused": refused,
                  "interface": os.environ.get("GLOO_SOCKET_IFNAME")}))
mesh.close()
sys.stdout.flush()
os._exit(0)  # as workers end: threads of torch may abort an interpreter that takes itself apart
"""


def start(rank: int, rendezvous: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(rank), rendezvous],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )


def test_groups_of_four_ranks(tmp_path: Path) -> None:
    processes = [start(rank, str(tmp_path / "meet")) for rank in range(4)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [answer["sums"]["tp"] for answer in answers] == [11, 11, 1100, 1100]
    assert [answer["sums"]["dp"] for answer in answers] == [101, 1010, 101, 1010]
    assert [answer["sums"]["ep"] for answer in answers] == [1111] * 4
    assert all(answer["pp"] and answer["ep_is_world"] for answer in answers)
    assert {answer["interface"] for answer in answers} == {"lo"}
    assert all(answer["refused"] == answer["ports"] >= 3 for answer in answers), answers


def test_missing_ranks_are_named_in_bounded_time(tmp_path: Path) -> None:
    where = str(tmp_path / "meet")
    plan = Plan(tp_attn=3, tp_expert=3)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"rank 0 waited 1 s.*missing: rank 1, 2 of 3"):
        open_mesh(plan, 0, torch_backends={"tp": "gloo"}, rendezvous=where, timeout_s=1.0)
    assert time.monotonic() - started < 10.0


def test_one_rank_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from core.parallel.mesh import open_mesh\n"
        "from core.parallel.plan import Plan\n"
        "mesh = open_mesh(Plan(), 0, torch_backends={'tp': 'gloo', 'ep': 'gloo'},\n"
        "                 rendezvous=sys.argv[1], timeout_s=1)\n"
        "assert mesh.group('tp') is None and mesh.group('ep') is None\n"
        "mesh.close()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    meet = tmp_path / "meet"
    assert subprocess.run([sys.executable, "-c", code, str(meet)], cwd=ROOT).returncode == 0
    assert not meet.exists()
