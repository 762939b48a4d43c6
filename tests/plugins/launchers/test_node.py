"""What ranks of a node get once its place is known, whatever launcher found it."""

import pytest

from core.errors import ConfigError, PlanError, ResourceError
from core.interfaces.launcher import Launcher, Machine, NativeDtypes, RemoteLauncher, Site
from core.parallel.plan import Plan
from core.settings.config import AppConfig, LaunchConfig, ModelConfig
from plugins.launchers import register_launcher
from plugins.launchers._node import (
    SPIN_COUNT,
    WAITING_VARIABLES,
    NodeLauncher,
    NodeOptions,
    require_unset,
)

DTYPES = NativeDtypes(native={}, lacking={})
CPU = Machine(device="cpu", num_devices=0, cpus=(0, 1, 2, 3, 8, 9, 10), dtypes=DTYPES)
ALONE = Site()


def launcher(
    site: Site = ALONE, *, pin_cpus: bool = False, threads_per_worker: int | None = None
) -> NodeLauncher:
    launch = LaunchConfig(threads_per_worker=threads_per_worker)
    config = AppConfig(model=ModelConfig(name="m"), launch=launch)
    return NodeLauncher(site, NodeOptions(pin_cpus=pin_cpus), config)


def node(node_rank: int, nnodes: int = 2) -> Site:
    return Site(nnodes=nnodes, node_rank=node_rank, rendezvous="10.0.0.1:20000")


def tp(size: int) -> Plan:
    return Plan(tp_attn=size, tp_expert=size)


@pytest.fixture(autouse=True)
def no_waiting_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in WAITING_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_cpu_ranks_share_the_cores() -> None:
    placements = launcher().placements(tp(3), CPU)
    assert [(p.rank, p.local_rank, p.device) for p in placements] == [
        (0, 0, "cpu"),
        (1, 1, "cpu"),
        (2, 2, "cpu"),
    ]
    assert [p.num_threads for p in placements] == [2, 2, 2]
    assert placements[0].env == {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "GOMP_SPINCOUNT": SPIN_COUNT,
    }
    assert [p.cpus for p in placements] == [None] * 3


def test_the_users_waiting_policy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (placement,) = launcher().placements(Plan(), CPU)
    assert "GOMP_SPINCOUNT" not in placement.env


def test_more_ranks_than_cores_get_one_thread_each() -> None:
    assert {p.num_threads for p in launcher().placements(tp(16), CPU)} == {1}


def test_the_setting_decides_the_threads() -> None:
    (placement,) = launcher(threads_per_worker=5).placements(Plan(), CPU)
    assert (placement.num_threads, placement.env["OMP_NUM_THREADS"]) == (5, "5")


def test_pinned_ranks_own_neighbouring_cpus() -> None:
    placements = launcher(pin_cpus=True).placements(tp(3), CPU)
    assert [p.cpus for p in placements] == [(0, 1), (2, 3), (8, 9)]
    with pytest.raises(ResourceError, match=r"launch.options.pin_cpus=true.*8 ranks.*7"):
        launcher(pin_cpus=True).placements(tp(8), CPU)


def test_cuda_ranks_take_the_device_of_their_local_rank() -> None:
    machine = Machine(device="cuda", num_devices=2, cpus=tuple(range(32)), dtypes=DTYPES)
    assert [p.device for p in launcher().placements(tp(2), machine)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ResourceError, match=r"needs 4 CUDA devices \(parallel.tp\).*offers 2"):
        launcher().placements(tp(4), machine)
    second = launcher(node(1)).placements(tp(4), machine)
    assert [(p.rank, p.device) for p in second] == [(2, "cuda:0"), (3, "cuda:1")]
    with pytest.raises(ResourceError, match=r"4 CUDA devices \(parallel.tp\) on node 1.*nnodes"):
        launcher(node(1)).placements(tp(8), machine)


def test_the_nodes_together_run_every_rank_once() -> None:
    plan = Plan(dp=4, tp_attn=2, ep=8)
    ranks = [
        [(p.rank, p.local_rank) for p in launcher(node(rank, 4)).placements(plan, CPU)]
        for rank in range(4)
    ]
    assert ranks == [
        [(0, 0), (1, 1)],
        [(2, 0), (3, 1)],
        [(4, 0), (5, 1)],
        [(6, 0), (7, 1)],
    ]


def test_threads_and_pinning_are_shared_among_local_ranks_only() -> None:
    placements = launcher(node(1), pin_cpus=True).placements(tp(6), CPU)
    assert [p.num_threads for p in placements] == [2, 2, 2]
    assert [p.cpus for p in placements] == [(0, 1), (2, 3), (8, 9)]


def test_ranks_that_nodes_cant_share_evenly_are_refused() -> None:
    with pytest.raises(PlanError) as caught:
        launcher(node(0, 3)).placements(tp(16), CPU)
    (problem,) = caught.value.problems
    assert problem.startswith("launch.nnodes=3: the 16 ranks of the plan (parallel.tp) can't be")
    assert problem.endswith("1, 2, 4, 8, 16")


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"nnodes": 3}, "launch.nnodes=3, but launch=x found 2"),
        ({"nnodes": 2, "node_rank": 0}, None),
        ({"nnodes": 2, "node_rank": 1}, None),
        ({"nnodes": 4, "node_rank": 1}, "launch.nnodes=4, but launch=x found 2"),
        ({}, None),
    ],
)
def test_settings_may_repeat_what_was_found_and_not_contradict_it(
    given: dict, fragment: str | None
) -> None:
    launch = LaunchConfig(**given)
    if fragment is None:
        require_unset("x", launch, nnodes=2, node_rank=1)
        return
    with pytest.raises(ConfigError) as caught:
        require_unset("x", launch, nnodes=2, node_rank=1)
    assert str(caught.value).startswith(fragment)


def test_a_contradicting_rank_is_named() -> None:
    launch = LaunchConfig(nnodes=4, node_rank=2)
    with pytest.raises(ConfigError, match=r"launch\.node_rank=2, but launch=x found 1; leave"):
        require_unset("x", launch, nnodes=4, node_rank=1)


def test_it_is_a_launcher_and_not_a_remote_one() -> None:
    found: Launcher = launcher(node(1))
    assert not isinstance(found, RemoteLauncher)
    assert found.site() == node(1)


def test_every_launcher_is_registered_with_options_that_pin_cpus() -> None:
    registrations = register_launcher()
    names = [registration.name for registration in registrations]
    assert names == ["static", "local", "slurm", "kubernetes", "ray"]
    assert all(issubclass(registration.config, NodeOptions) for registration in registrations)
