"""The launcher `local`: what each rank gets, and what it refuses."""

import pytest

from core.config import AppConfig, LaunchConfig, ModelConfig
from core.errors import ConfigError, ResourceError
from core.interfaces.launcher import Machine, Site
from core.parallel.plan import Plan
from plugins.launchers import register_launcher
from plugins.launchers.local import SPIN_COUNT, WAITING_VARIABLES, LocalLauncher, LocalOptions


def launcher(*, pin_cpus: bool = False, **launch: object) -> LocalLauncher:
    config = AppConfig(model=ModelConfig(name="m"), launch=LaunchConfig(**launch))
    return LocalLauncher(LocalOptions(pin_cpus=pin_cpus), config)


def tp(size: int) -> Plan:
    return Plan(tp_attn=size, tp_expert=size)


CPU = Machine(device="cpu", num_devices=0, cpus=(0, 1, 2, 3, 8, 9, 10))


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
    machine = Machine(device="cuda", num_devices=2, cpus=tuple(range(32)))
    assert [p.device for p in launcher().placements(tp(2), machine)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ResourceError, match=r"needs 4 CUDA devices \(parallel.tp\).*offers 2"):
        launcher().placements(tp(4), machine)


def test_several_nodes_are_refused_with_both_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        launcher(nnodes=2, dist_init_addr="10.0.0.1:20000")
    assert str(caught.value).startswith(
        "launch.nnodes=2 and launch.dist_init_addr=10.0.0.1:20000: launch=local starts every rank"
    )
    assert launcher().site() == Site(nnodes=1, node_rank=0, rendezvous=None)


def test_it_is_registered_with_its_options() -> None:
    (registration,) = register_launcher()
    assert (registration.name, registration.config) == ("local", LocalOptions)
