"""The launcher `ray`: the words it gives to nodes, when it loses patience, and runs on two real
(local) Ray nodes with a stand-in for the engine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import ConfigError, PlanError, ResourceError
from core.interfaces.launcher import RemoteLauncher
from core.settings.config import (
    TOKEN_VARIABLE,
    AppConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
)
from core.settings.schema import build
from plugins.launchers._ray_node import NodeProcess
from plugins.launchers.ray import (
    KILL_AFTER_S,
    OWN_END_S,
    RayLauncher,
    RayOptions,
    _Patience,
    node_words,
)

ROOT = Path(__file__).parents[3]
FAKE_NODE = "tests.support.fake_node"


def config(nnodes: int = 2, **launch: object) -> AppConfig:
    return AppConfig(
        model=ModelConfig(name="m"),
        parallel=ParallelConfig(tp=4),
        launch=LaunchConfig(nnodes=nnodes, shutdown_grace_s=5, **launch),
    )


def test_nodes_get_the_words_typed_with_a_place_of_their_own():
    typed = [
        "+model=deepseek_v3",
        "launch=ray",
        "++launch.nnodes=2",
        "launch.options.pin_cpus=true",
        "+launch.options.resources={a: 1}",
        "launch.options={}",
        "launch.name=ray",
        "cluster.token_file=/token",
        "cluster.join_timeout_s=9",
        "launch.step_timeout_s=7",
        "--config-dir",
        "/my/conf",
    ]
    assert node_words(typed, config(options={"pin_cpus": True}), 1, "10.0.0.7:20000") == [
        "+model=deepseek_v3",
        "cluster.token_file=/token",
        "cluster.join_timeout_s=9",
        "launch.step_timeout_s=7",
        "--config-dir",
        "/my/conf",
        "launch=static",
        "launch.nnodes=2",
        "launch.node_rank=1",
        'launch.dist_init_addr="10.0.0.7:20000"',
        "launch.options.pin_cpus=true",
    ]


def test_one_node_gets_no_address():
    words = node_words(["+model=m", "launch=ray"], config(nnodes=1), 0, "h:1")
    assert words == ["+model=m", "launch=static", "launch.nnodes=1"]


def test_what_ray_decides_cant_be_set():
    for launch in ({"node_rank": 1}, {"dist_init_addr": "h:1"}):
        with pytest.raises(ConfigError, match=r"leave launch\.node_rank and launch\.dist_init"):
            RayLauncher(RayOptions(), config(**launch))
    with pytest.raises(PlanError, match=r"launch\.nnodes=3: the 4 ranks"):
        RayLauncher(RayOptions(), config(nnodes=3))
    assert isinstance(RayLauncher(RayOptions(), config()), RemoteLauncher)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'nodeweave\[ray\]'"):
        RayLauncher(RayOptions(), config()).drive([])


class Asked:
    """Stands for an actor's `stop`; records how it was asked."""

    def __init__(self):
        self.calls = []

    def remote(self, kill=False):
        self.calls.append("kill" if kill else "ask")


@pytest.mark.parametrize(
    ("looks", "calls"),
    [
        ([(0, False, 0), (100, False, 0)], []),
        ([(0, True, 0), (OWN_END_S - 1, False, 0)], []),
        ([(0, True, 0), (OWN_END_S, False, 0), (OWN_END_S + 1, True, 0)], ["ask"]),
        ([(0, True, 0), (4, True, 0), (OWN_END_S, False, 0)], ["ask"]),
        ([(0, True, 0), (OWN_END_S, False, 0), (OWN_END_S + 20, False, 0)], ["ask", "kill"]),
        ([(0, False, 1), (1, False, 1)], ["ask"]),
        ([(0, False, 1), (1, False, 2), (2, False, 3)], ["ask", "kill"]),
        ([(0, False, 2)], ["ask", "kill"]),
    ],
)
def test_nodes_are_left_then_asked_then_killed(looks, calls):
    stops = [Asked(), Asked()]
    patience = _Patience(stops, kill_after_s=20)
    for now, one_ended, num_signals in looks:
        patience.look(one_ended, num_signals, clock=lambda now=now: now)
    assert [stop.calls for stop in stops] == [calls, calls]


def test_a_node_that_was_stopped_before_it_ran_does_not_run(tmp_path):
    node = NodeProcess()
    node.stop()
    assert node.run(FAKE_NODE, [f"fake.out={tmp_path}"], {}, ".") == (-signal.SIGTERM, [])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def cluster():
    """Two Ray nodes on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = {"num_cpus": 2, "object_store_memory": 80 * 1024 * 1024, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=nodes)
    cluster.add_node(num_cpus=2, object_store_memory=80 * 1024 * 1024)
    yield cluster
    cluster.shutdown()


def drive(cluster, tmp_path, *told, settings=None, **options):
    """Run the stand-in on both nodes; (exit status, what each node recorded)."""
    options = RayOptions(address=cluster.address, base_port=21000, **options)
    words = [f"fake.out={tmp_path}", *told, "launch=ray", "launch.nnodes=2"]
    status = RayLauncher(options, settings or config(), FAKE_NODE).drive(words)
    return status, records(tmp_path)


def records(folder):
    """What each node said of itself, by rank."""
    files = sorted(folder.glob("*.json"))
    return [SimpleNamespace(**json.loads(path.read_text())) for path in files]


def wait_for_end(nodes):
    deadline = time.monotonic() + 20
    while any(alive(node.pid) for node in nodes):
        assert time.monotonic() < deadline, "a node outlived what started it"
        threading.Event().wait(0.05)


def test_both_nodes_get_rank_address_and_token(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "00ff")
    status, nodes = drive(cluster, tmp_path, "fake.ends=all", "fake.status=0")
    assert status == 0
    ranks = [node.words[-2:] for node in nodes]
    address = ranks[0][1]
    assert address.startswith('launch.dist_init_addr="')
    assert address.endswith(':21000"')
    assert ranks == [[f"launch.node_rank={rank}", address] for rank in (0, 1)]
    assert nodes[0].words[:-2] == nodes[1].words[:-2]
    assert "launch=static" in nodes[0].words
    assert [node.token for node in nodes] == ["00ff", "00ff"]
    assert {node.folder for node in nodes} == {os.getcwd()}
    assert nodes[0].pid != nodes[1].pid


def test_when_one_node_ends_badly_all_end_and_it_is_named(cluster, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("plugins.launchers.ray.OWN_END_S", 0.0)
    status, nodes = drive(cluster, tmp_path, "fake.ends=1", "fake.status=3")
    assert status == 3
    printed = capfd.readouterr().err
    assert "error: node 1 ended with status 3; its last lines:" in printed
    assert "\n  node 1 has had enough" in printed
    assert not any(alive(node.pid) for node in nodes)


def when_both_are_up(tmp_path, act):
    """Start a thread that calls `act` with what both nodes recorded, once they have."""

    def watch():
        while len(list(tmp_path.glob("*.json"))) < 2:
            threading.Event().wait(0.05)
        act(*records(tmp_path))

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_nodes(cluster, tmp_path, number):
    sender = when_both_are_up(tmp_path, lambda *nodes: os.kill(os.getpid(), number))
    status, nodes = drive(cluster, tmp_path)
    sender.join()
    assert (status, len(nodes)) == (0, 2)
    assert not any(alive(node.pid) for node in nodes)


def test_a_node_whose_actor_is_killed_ends_and_so_do_the_others(
    cluster, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("plugins.launchers.ray.OWN_END_S", 0.0)
    killer = when_both_are_up(tmp_path, lambda first, _: os.kill(first.parent, signal.SIGKILL))
    status, nodes = drive(cluster, tmp_path)
    killer.join()
    assert status == 1
    assert "error: node 0 is gone: " in capfd.readouterr().err
    wait_for_end(nodes)


def test_when_the_driver_is_killed_the_nodes_end(cluster, tmp_path):
    code = (
        "from tests.plugins.launchers.test_ray import *\n"
        f"options = RayOptions(address={cluster.address!r}, base_port=21000)\n"
        f"words = ['fake.out={tmp_path}', 'launch=ray', 'launch.nnodes=2']\n"
        "RayLauncher(options, config(), FAKE_NODE).drive(words)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    when_both_are_up(tmp_path, lambda *nodes: driver.kill()).join()
    assert driver.wait() == -signal.SIGKILL
    wait_for_end(records(tmp_path))


def test_too_few_nodes_are_an_error_that_says_what_there_is(cluster, tmp_path):
    settings = config(nnodes=4)
    with pytest.raises(ResourceError) as caught:
        drive(cluster, tmp_path, settings=settings, placement_timeout_s=1.0)
    assert "no room for 4 nodes with {'CPU': 1.0} each" in str(caught.value)
    assert "it has 2 nodes" in str(caught.value)


def test_resources_that_no_node_has_are_named(cluster, tmp_path):
    with pytest.raises(ResourceError, match=r"'switch': 1\.0"):
        drive(cluster, tmp_path, resources={"switch": 1.0}, placement_timeout_s=1.0)


def test_no_ray_cluster_is_an_error_that_says_how_to_start_one():
    pytest.importorskip("ray")
    with pytest.raises(
        ResourceError, match=r"address=127\.0\.0\.1:1\).*refused\n.*ray start --head"
    ):
        RayLauncher(RayOptions(address="127.0.0.1:1"), config()).drive([])


@pytest.mark.parametrize("error", [ConnectionError("none runs"), RuntimeError("Version mismatch")])
def test_what_ray_says_when_it_cant_be_joined_is_passed_on(monkeypatch, error):
    def refuse(**settings):
        raise error

    monkeypatch.setattr(pytest.importorskip("ray"), "init", refuse)
    with pytest.raises(ResourceError, match=rf"address=auto\): {error}\n.*ray start --head"):
        RayLauncher(RayOptions(), config()).drive([])


@pytest.mark.parametrize(
    "options",
    [
        {"address": "ray://h:10001"},
        {"address": "local"},
        {"base_port": 0},
        {"cpus_per_node": -1.0},
        {"placement_timeout_s": 0.0},
    ],
)
def test_wrong_options_are_refused_with_their_key(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"launch\.options: .*{name}"):
        build(RayOptions, options, "launch.options")


def test_patience_is_longer_than_the_grace_of_requests():
    assert KILL_AFTER_S > OWN_END_S > 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
