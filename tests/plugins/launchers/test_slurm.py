"""The launcher `slurm` with made-up jobs: where a task stands, and jobs it refuses."""

import pytest

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.schema import build
from plugins.launchers.slurm import SlurmOptions, default_port, find_site, make_launcher


def step(**changes: str) -> dict[str, str]:
    """The second task of `srun --ntasks-per-node=1` on two nodes; None removes a variable."""
    env = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "gpu[07-09]",
        "SLURM_STEP_NODELIST": "gpu[08-09]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    return {name: value for name, value in (env | changes).items() if value is not None}


def test_a_task_finds_its_place_in_the_step(config_with, monkeypatch):
    port = 10000 + 128 * (4711 % 128)
    site = Site(nnodes=2, node_rank=1, rendezvous=f"gpu08:{port}")
    assert find_site(SlurmOptions(), config_with(), step()) == site
    for name, value in step().items():
        monkeypatch.setenv(name, value)
    assert make_launcher(SlurmOptions(), config_with()).site() == site


def test_the_first_task_is_node_0(config_with):
    site = find_site(SlurmOptions(), config_with(), step(SLURM_NODEID="0", SLURM_PROCID="0"))
    assert site.node_rank == 0


def test_ports_of_jobs_stay_below_those_that_linux_hands_out():
    ports = {default_port(job_id) for job_id in range(1000)}
    assert len(ports) == 128
    assert min(ports) == 10000
    assert max(ports) + 127 < 30000
    assert default_port(5) - default_port(4) == 128


def test_options_and_settings_decide_port_and_host(config_with):
    options = SlurmOptions(base_port=25000)
    assert find_site(options, config_with(), step()).rendezvous == "gpu08:25000"
    config = config_with(dist_init_addr="192.168.7.8:4000")
    assert find_site(options, config, step()).rendezvous == "192.168.7.8:4000"


def test_one_node_needs_no_address(config_with):
    alone = step(
        SLURM_STEP_NODELIST="gpu07", SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="1",
        SLURM_NODEID="0",
    )  # fmt: skip
    assert find_site(SlurmOptions(), config_with(), alone) == Site()
    batch = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    assert find_site(SlurmOptions(), config_with(), batch) == Site()


@pytest.mark.parametrize(
    ("env", "fragment"),
    [
        ({}, r"reads SLURM_JOB_ID, which is not set; start it in a job with srun .*launch=static"),
        (step(SLURM_JOB_ID="x"), "SLURM_JOB_ID='x' is not a number"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"},
            "this job has 2 nodes, and only the first runs the batch script; .*srun --ntasks-per",
        ),
        (step(SLURM_STEP_NUM_TASKS="16"), "one task on each node, .* 16 tasks on 2 nodes"),
        (step(SLURM_LOCALID="1"), "one task on each node, .*this is task 1 of its node"),
        (step(SLURM_NODEID=None), "reads SLURM_NODEID, which is not set"),
        (step(SLURM_NODEID="-1"), "SLURM_NODEID='-1' is not a number"),
        (step(SLURM_NODEID="2"), r"contradict each other.*gpu\[08-09\] has 2 hosts.*NODEID=2"),
        (step(SLURM_STEP_NODELIST="gpu[08-10]"), r"contradict each other.*has 3 hosts"),
        (step(SLURM_STEP_NODELIST="gpu[08-"), r"SLURM_STEP_NODELIST: can't read '\[08-'"),
    ],
)
def test_what_is_no_step_of_one_task_a_node_is_refused(config_with, env, fragment):
    with pytest.raises(ConfigError, match=fragment):
        find_site(SlurmOptions(), config_with(), env)


def test_settings_that_contradict_the_job_are_refused(config_with):
    with pytest.raises(ConfigError, match=r"launch\.nnodes=3, but launch=slurm found 2"):
        find_site(SlurmOptions(), config_with(nnodes=3), step())


@pytest.mark.parametrize("port", [0, 70000])
def test_a_port_that_is_none_is_refused_with_its_key(port):
    with pytest.raises(ConfigError, match=rf"launch\.options: base_port={port} is out of range"):
        build(SlurmOptions, {"base_port": port}, "launch.options")
