"""A node of a Slurm job: its place is read from the variables that srun sets for each task.

One task per node (`srun --ntasks-per-node=1 python -m core.run ... launch=slurm`); node 0 is the
step's first host. Runs no Slurm command. Source of the variables: `man srun`, OUTPUT ENVIRONMENT.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.config import AppConfig
from plugins.launchers._hostlist import expand
from plugins.launchers._node import NodeLauncher, NodeOptions, require_unset

# Ports of jobs that name none: 128 for each of 128 jobs, below the range that Linux hands out to
# clients (32768 and up) and away from the frontend's 30000.
FIRST_PORT, PORTS_PER_JOB, NUM_SLOTS = 10000, 128, 128
HOW = "srun --ntasks-per-node=1 python -m core.run ... launch=slurm"


@dataclass(slots=True, kw_only=True)
class SlurmOptions(NodeOptions):
    """launch.options of `slurm`."""

    # First port of the run, on node 0 (see core.cluster.nodes.ports). None: from the job's id, so
    # that jobs that share node 0 rarely meet; two steps of one job need one each.
    base_port: int | None = None

    def __post_init__(self) -> None:
        if self.base_port is not None and not 1 <= self.base_port <= 65535:
            raise ValueError(f"base_port={self.base_port} is out of range; allowed: 1 to 65535")


def make_launcher(options: SlurmOptions, config: AppConfig) -> NodeLauncher:
    """The factory behind launch=slurm. Raises ConfigError outside of a job, and where the tasks
    are not one for each node."""
    site = find_site(options, config, os.environ)
    return NodeLauncher(site, options, config)


def find_site(options: SlurmOptions, config: AppConfig, env: Mapping[str, str]) -> Site:
    """This task's place, from the job's variables."""
    job_id = _number(env, "SLURM_JOB_ID", f"start it in a job with {HOW}, or use launch=static")
    if "SLURM_STEP_NODELIST" not in env:
        return _site_outside_a_step(config, env)
    nnodes = _number(env, "SLURM_STEP_NUM_NODES")
    num_tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    node_rank = _number(env, "SLURM_NODEID")
    local_id = _number(env, "SLURM_LOCALID")
    if num_tasks != nnodes or local_id != 0:
        raise ConfigError(
            f"launch=slurm needs one task on each node, and this step has {num_tasks} tasks on "
            f"{nnodes} nodes (this is task {local_id} of its node): {HOW}"
        )
    try:
        hosts = expand(env["SLURM_STEP_NODELIST"])
    except ValueError as error:
        raise ConfigError(f"launch=slurm: SLURM_STEP_NODELIST: {error}") from error
    if len(hosts) != nnodes or not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"launch=slurm: the job's variables contradict each other: SLURM_STEP_NODELIST="
            f"{env['SLURM_STEP_NODELIST']} has {len(hosts)} hosts, SLURM_STEP_NUM_NODES={nnodes}, "
            f"SLURM_NODEID={node_rank}; say it yourself with launch=static"
        )
    require_unset("slurm", config.launch, nnodes, node_rank)
    if nnodes == 1:
        return Site()
    port = options.base_port or default_port(job_id)
    rendezvous = config.launch.dist_init_addr or f"{hosts[0]}:{port}"
    return Site(nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)


def default_port(job_id: int) -> int:
    """The first port of a job that names none."""
    return FIRST_PORT + PORTS_PER_JOB * (job_id % NUM_SLOTS)


def _site_outside_a_step(config: AppConfig, env: Mapping[str, str]) -> Site:
    """In a batch script itself: fine on one node, but on several it runs on the first alone."""
    nnodes = _number(env, "SLURM_JOB_NUM_NODES")
    if nnodes != 1:
        raise ConfigError(
            f"launch=slurm: this job has {nnodes} nodes, and only the first runs the batch script; "
            f"start a task on each: {HOW}"
        )
    require_unset("slurm", config.launch, 1, 0)
    return Site()


def _number(env: Mapping[str, str], name: str, advice: str = f"start it with {HOW}") -> int:
    text = env.get(name)
    if text is None:
        raise ConfigError(f"launch=slurm reads {name}, which is not set; {advice}")
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"launch=slurm: {name}={text!r} is not a number; {advice}")
    return int(text)
