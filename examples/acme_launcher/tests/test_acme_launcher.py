"""Where a pod finds itself, what it runs, and what it refuses."""

import pytest
from acme_launcher import AcmeOptions
from acme_launcher.launcher import AcmeLauncher, find_site

from core.errors import ConfigError, PlanError, ResourceError
from core.interfaces.launcher import Machine, NativeDtypes, Site
from core.parallel.plan import Plan

DTYPES = NativeDtypes(native={}, lacking={})
TWO_PODS = {"WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0"}
PLAN = Plan(tp_attn=4, tp_expert=4)


def machine(gpus: int) -> Machine:
    device = "cuda" if gpus else "cpu"
    return Machine(device=device, num_devices=gpus, cpus=tuple(range(8)), dtypes=DTYPES)


def test_a_pod_finds_its_place() -> None:
    options = AcmeOptions(base_port=21000)
    second = Site(nnodes=2, node_rank=1, rendezvous="job-master-0:21000")
    assert find_site(options, TWO_PODS | {"RANK": "1"}) == second
    assert find_site(options, {}) == Site()
    assert (
        find_site(options, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}) == Site()
    )


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0", "MASTER_ADDR": "a"}, "'WORLD_SIZE'"),
        (TWO_PODS | {"RANK": "first"}, "'first'"),
        (TWO_PODS | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_variables_that_do_not_say_it_are_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_site(AcmeOptions(), env)


def test_the_nodes_share_the_ranks_of_a_plan() -> None:
    ranks = []
    for node_rank in range(2):
        site = Site(nnodes=2, node_rank=node_rank, rendezvous="a:1")
        placed = AcmeLauncher(site, None).placements(PLAN, machine(gpus=2))
        assert [placement.device for placement in placed] == ["cuda:0", "cuda:1"]
        ranks += [placement.rank for placement in placed]
    assert ranks == [0, 1, 2, 3]
    [*_, last] = AcmeLauncher(Site(), None).placements(PLAN, machine(gpus=0))
    assert (last.device, last.num_threads) == ("cpu", 2)


def test_too_few_gpus_and_uneven_shares_are_refused() -> None:
    with pytest.raises(ResourceError, match="is to run 4 ranks, and has 2 GPUs"):
        AcmeLauncher(Site(), None).placements(PLAN, machine(gpus=2))
    three = Site(nnodes=3, node_rank=0, rendezvous="a:1")
    with pytest.raises(PlanError, match="can't be shared by 3 nodes"):
        AcmeLauncher(three, None).placements(PLAN, machine(gpus=2))
