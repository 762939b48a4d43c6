"""The launcher `kubernetes` with made-up pods: where one stands, and pods it refuses."""

import pytest

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.schema import build
from plugins.launchers.kubernetes import KubernetesOptions, find_site, make_launcher

LWS = {
    "LWS_LEADER_ADDRESS": "v3-0.v3.models",
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "HOSTNAME": "v3-0-1",
}
OPTIONS = KubernetesOptions(service="v3")


def test_a_leader_worker_set_says_everything(config_with, monkeypatch):
    site = Site(nnodes=2, node_rank=1, rendezvous="v3-0.v3.models:20000")
    assert find_site(KubernetesOptions(), config_with(), LWS) == site
    for name, value in LWS.items():
        monkeypatch.setenv(name, value)
    assert make_launcher(KubernetesOptions(), config_with()).site() == site


def test_a_group_of_one_needs_no_address(config_with):
    env = LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}
    assert find_site(KubernetesOptions(), config_with(), env) == Site()


def test_a_stateful_sets_pod_is_numbered_by_its_name(config_with):
    config = config_with(nnodes=4)
    site = find_site(OPTIONS, config, {"HOSTNAME": "my-v3-3"})
    assert site == Site(nnodes=4, node_rank=3, rendezvous="my-v3-0.v3:20000")
    named = find_site(OPTIONS, config, {"HOSTNAME": "machine7", "POD_NAME": "my-v3-2"})
    assert (named.node_rank, named.rendezvous) == (2, "my-v3-0.v3:20000")


def test_an_indexed_jobs_pod_has_an_index_and_a_host_name(config_with):
    env = {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "serve-1", "POD_NAME": "serve-1-x7k2p"}
    site = find_site(OPTIONS, config_with(nnodes=2), env)
    assert site == Site(nnodes=2, node_rank=1, rendezvous="serve-0.v3:20000")


@pytest.mark.parametrize(("ip", "host"), [("10.8.0.3", "10.8.0.3"), ("fd00::3", "[fd00::3]")])
def test_the_first_pod_knows_its_own_address(config_with, ip, host):
    config = config_with(nnodes=2)
    first = find_site(OPTIONS, config, {"HOSTNAME": "v3-0", "POD_IP": ip})
    assert first.rendezvous == f"{host}:20000"
    second = find_site(OPTIONS, config, {"HOSTNAME": "v3-1", "POD_IP": ip})
    assert second.rendezvous == "v3-0.v3:20000"


def test_options_and_settings_decide_the_address(config_with):
    options = KubernetesOptions(service="v3", namespace="models", base_port=25000)
    pod = {"HOSTNAME": "v3-1"}
    assert find_site(options, config_with(nnodes=2), pod).rendezvous == "v3-0.v3.models.svc:25000"
    given = config_with(nnodes=2, dist_init_addr="10.0.0.1:4000")
    assert find_site(KubernetesOptions(), given, pod).rendezvous == "10.0.0.1:4000"


@pytest.mark.parametrize(
    ("env", "nnodes", "fragment"),
    [
        ({}, 2, "HOSTNAME='' ends with no index; run it in a LeaderWorkerSet"),
        ({"HOSTNAME": "laptop"}, 2, "HOSTNAME='laptop' ends with no index"),
        ({"HOSTNAME": "pod-x7k2p"}, 2, "ends with no index.*or use launch=static"),
        ({"HOSTNAME": "v3-2"}, 2, "has index 2, and the run has 2 nodes; set launch.nnodes"),
        ({"HOSTNAME": "v3-1"}, 1, "has index 1, and the run has 1 nodes"),
        ({"JOB_COMPLETION_INDEX": "x"}, 2, "JOB_COMPLETION_INDEX='x' is not a number"),
        (LWS | {"LWS_GROUP_SIZE": "two"}, 1, "LWS_GROUP_SIZE='two' is not a number"),
        (LWS | {"LWS_WORKER_INDEX": "2"}, 1, "has index 2, and the run has 2 nodes"),
        (
            {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": ""},
            1,
            "LWS_LEADER_ADDRESS, LWS_GROUP_SIZE is not set; pass all three",
        ),
        (LWS, 3, "launch.nnodes=3, but launch=kubernetes found 2"),
    ],
)
def test_what_is_no_numbered_pod_is_refused(config_with, env, nnodes, fragment):
    with pytest.raises(ConfigError, match=fragment):
        find_site(OPTIONS, config_with(nnodes=nnodes), env)


def test_pods_without_a_service_cant_find_the_first(config_with):
    with pytest.raises(ConfigError, match=r"needs launch\.options\.service=NAME"):
        find_site(KubernetesOptions(), config_with(nnodes=2), {"HOSTNAME": "v3-1"})


@pytest.mark.parametrize(
    "options", [{"service": "a b"}, {"service": ""}, {"namespace": "X"}, {"base_port": 0}]
)
def test_wrong_options_are_refused_with_their_key(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"launch\.options: {name}="):
        build(KubernetesOptions, options, "launch.options")
