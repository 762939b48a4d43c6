"""A node of a PyTorchJob learns its place from the variables that the operator sets in each pod:
RANK (of the pod), WORLD_SIZE (pods) and MASTER_ADDR (the first pod's name). Imports no torch.

Without RANK it is one machine. Source of the variables: Kubeflow's Training Operator.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from acme_launcher import AcmeOptions
from core.errors import ConfigError, PlanError, ResourceError
from core.interfaces.launcher import Machine, Placement, Site
from core.parallel.plan import Plan
from core.settings.config import AppConfig


def make_launcher(options: AcmeOptions, config: AppConfig) -> "AcmeLauncher":
    """The factory that the plugin registers."""
    return AcmeLauncher(find_site(options, os.environ), config.launch.threads_per_worker)


def find_site(options: AcmeOptions, env: Mapping[str, str]) -> Site:
    """This pod's place. Raises ConfigError where the variables don't say it."""
    if "RANK" not in env:
        return Site()
    try:
        node_rank, nnodes = int(env["RANK"]), int(env["WORLD_SIZE"])
        rendezvous = f"{env['MASTER_ADDR']}:{options.base_port}"
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"launch=acme reads RANK, WORLD_SIZE and MASTER_ADDR of a PyTorchJob: {error}; run it "
            "in one, or unset RANK for a single machine"
        ) from error
    if not 0 <= node_rank < nnodes:
        raise ConfigError(f"launch=acme: RANK={node_rank} is not below WORLD_SIZE={nnodes}")
    if nnodes == 1:
        return Site()
    return Site(nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)


@dataclass(frozen=True, slots=True)
class AcmeLauncher:
    """Fills core.interfaces.launcher.Launcher: equally many ranks on each node, in order."""

    place: Site
    threads_per_worker: int | None

    def site(self) -> Site:
        """As the variables said."""
        return self.place

    def placements(self, plan: Plan, machine: Machine) -> list[Placement]:
        """This node's ranks, each with a GPU of its own where there are any."""
        nnodes = self.place.nnodes
        if plan.world_size % nnodes:
            problem = f"{plan.world_size} ranks (parallel.tp) can't be shared by {nnodes} nodes"
            raise PlanError([f"{problem}; change parallel.tp or the job's number of pods"])
        here = plan.world_size // nnodes
        if machine.device == "cuda" and machine.num_devices < here:
            raise ResourceError(
                f"node {self.place.node_rank} is to run {here} ranks, and has "
                f"{machine.num_devices} GPUs; lower parallel.tp, or give each pod more of them"
            )
        threads = self.threads_per_worker or max(1, len(machine.cpus) // here)
        return [
            Placement(
                rank=self.place.node_rank * here + local_rank,
                local_rank=local_rank,
                device=f"cuda:{local_rank}" if machine.device == "cuda" else machine.device,
                num_threads=threads,
                cpus=None,
                env={"OMP_NUM_THREADS": str(threads)},
            )
            for local_rank in range(here)
        ]
