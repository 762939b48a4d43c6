"""What launchers share once they know their node: which ranks run here, on what.

Ranks are shared out evenly in order: node n of m runs ranks n * world / m and up. One process for
each rank, CUDA device = local rank. Knows nothing of how a node is found. Imports no torch.
"""

import os
from dataclasses import dataclass

from core.errors import ConfigError, PlanError, ResourceError
from core.interfaces.launcher import Machine, Placement, Site
from core.parallel.plan import Plan
from core.settings.config import AppConfig, LaunchConfig

WAITING_VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
# How long an OpenMP thread spins for its siblings before it sleeps. By default it spins for
# milliseconds, and where another process wants a core, all threads wait for the one that lost its
# own: on two cores a step of 22 ms then took 950 ms. With less than this value a quiet machine's
# steps of several rows take longer, as threads sleep between the parts of a step.
SPIN_COUNT = "2500"


@dataclass(slots=True, kw_only=True)
class NodeOptions:
    """launch.options of every launcher whose nodes start workers."""

    pin_cpus: bool = False  # give each worker its own CPUs, for machines of several sockets


class NodeLauncher:
    """A launcher whose place among the nodes is known."""

    def __init__(self, site: Site, options: NodeOptions, config: AppConfig) -> None:
        self._site = site
        self._options = options
        self._threads_per_worker = config.launch.threads_per_worker

    def site(self) -> Site:
        """As given."""
        return self._site

    def placements(self, plan: Plan, machine: Machine) -> list[Placement]:
        """This node's share of the ranks. CPU threads are shared out evenly, at least one each.

        Raises PlanError where the ranks can't be shared evenly by the nodes.
        """
        num_workers = ranks_per_node(plan.world_size, self._site.nnodes)
        share = self._cpus_each(num_workers, machine)
        num_threads = self._threads_per_worker or max(1, share)
        first_rank = self._site.node_rank * num_workers
        return [
            Placement(
                rank=first_rank + local_rank,
                local_rank=local_rank,
                device=f"cuda:{local_rank}" if machine.device == "cuda" else machine.device,
                num_threads=num_threads,
                cpus=(
                    machine.cpus[local_rank * share : (local_rank + 1) * share]
                    if self._options.pin_cpus
                    else None
                ),
                env=_thread_environment(num_threads),
            )
            for local_rank in range(num_workers)
        ]

    def _cpus_each(self, num_workers: int, machine: Machine) -> int:
        """Whole CPUs for each worker, maybe 0. Raises ResourceError where something is short."""
        site = self._site
        here = f"node {site.node_rank}" if site.nnodes > 1 else "this machine"
        if machine.device == "cuda" and num_workers > machine.num_devices:
            more_nodes = ", raise launch.nnodes," if site.nnodes > 1 else ""
            raise ResourceError(
                f"the plan needs {num_workers} CUDA devices (parallel.tp) on {here}, one for each "
                f"rank, but it offers {machine.num_devices}; lower parallel.tp{more_nodes} or "
                "widen CUDA_VISIBLE_DEVICES"
            )
        share = len(machine.cpus) // num_workers
        if self._options.pin_cpus and share == 0:
            raise ResourceError(
                f"launch.options.pin_cpus=true needs a CPU for each of {num_workers} ranks, but "
                f"on {here} this process may use {len(machine.cpus)}; set it to false"
            )
        return share


def ranks_per_node(world_size: int, nnodes: int) -> int:
    """Raises PlanError where `nnodes` nodes can't have equally many ranks."""
    if world_size % nnodes != 0:
        allowed = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise PlanError(
            [
                f"launch.nnodes={nnodes}: the {world_size} ranks of the plan (parallel.tp) can't "
                f"be shared evenly by {nnodes} nodes; numbers of nodes that can: "
                f"{', '.join(allowed)}"
            ]
        )
    return world_size // nnodes


def require_unset(launcher: str, launch: LaunchConfig, nnodes: int, node_rank: int) -> None:
    """Raise ConfigError where the settings name another place than the one that `launcher` found:
    `launch.nnodes` and `launch.node_rank` are left out, or agree."""
    for key, given, found, default in (
        ("launch.nnodes", launch.nnodes, nnodes, 1),
        ("launch.node_rank", launch.node_rank, node_rank, 0),
    ):
        if given not in (default, found):
            raise ConfigError(
                f"{key}={given}, but launch={launcher} found {found}; leave {key} out, or choose "
                "launch=static to say it yourself"
            )


def _thread_environment(num_threads: int) -> dict[str, str]:
    """Variables of the libraries that compute in threads; the user's own waiting policy stays."""
    env = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    if not WAITING_VARIABLES & os.environ.keys():
        env["GOMP_SPINCOUNT"] = SPIN_COUNT
    return env
