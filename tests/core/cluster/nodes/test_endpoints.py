"""The private folder of a run."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from core.cluster.nodes.endpoints import RunDirectory, node_endpoints
from core.cluster.nodes.ports import Ports
from core.errors import ResourceError
from core.parallel.plan import Plan


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    return short


def test_it_is_private_and_removed_with_its_contents(runtime_dir: Path) -> None:
    with RunDirectory(2) as run:
        assert run.path.parent == runtime_dir
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
        assert not run.rendezvous.exists()
        run.rendezvous.write_text("x")
    assert not run.path.exists()
    run.remove()


def test_every_socket_has_its_own_address_in_it(runtime_dir: Path) -> None:
    with RunDirectory(3) as run:
        endpoints = run.endpoints()
        addresses = [endpoints.engine, endpoints.lockstep, *endpoints.steps]
        assert len(endpoints.steps) == 3
        assert len(set(addresses)) == 5
        assert all(address.startswith(f"ipc://{run.path}/") for address in addresses)
        assert (endpoints.store, endpoints.key) == (str(run.rendezvous), "")


def test_a_long_path_is_passed_over(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with RunDirectory(2) as run:
        assert run.path.parent != long
    assert list(long.iterdir()) == []


def test_no_usable_folder_is_an_error_with_every_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    missing = tmp_path / "missing"
    monkeypatch.setattr("core.cluster.nodes.endpoints._parents", lambda: [str(missing), str(long)])
    with pytest.raises(ResourceError) as caught:
        RunDirectory(2)
    head, *reasons = str(caught.value).splitlines()
    assert "set XDG_RUNTIME_DIR or TMPDIR" in head
    assert reasons[0] == f"  {missing}: No such file or directory"
    assert reasons[1].startswith(f"  {long}: a socket's path would have ")


def test_between_nodes_each_leader_s_socket_is_on_its_own_node() -> None:
    plan = Plan(dp=4, tp_attn=2, ep=8)
    endpoints = node_endpoints(plan, Ports(20000, 4), ["10.0.0.1", "fd00::2"], "ab")
    assert endpoints.engine == "tcp://10.0.0.1:20002"
    assert endpoints.lockstep == "tcp://10.0.0.1:20003"
    assert endpoints.store == "tcp://10.0.0.1:20001"
    assert endpoints.key == "ab"
    assert endpoints.steps == [
        "tcp://10.0.0.1:20016",
        "tcp://10.0.0.1:20017",
        "tcp://[fd00::2]:20018",
        "tcp://[fd00::2]:20019",
    ]


def test_a_run_that_was_killed_is_cleaned_up_by_the_next(runtime_dir: Path) -> None:
    killed = RunDirectory(1)
    assert killed._dir._lock_fd is not None
    os.close(killed._dir._lock_fd)  # as the kernel does at its end
    killed.rendezvous.touch()
    with RunDirectory(1) as first, RunDirectory(1) as second:
        assert sorted(runtime_dir.iterdir()) == sorted([first.path, second.path])
