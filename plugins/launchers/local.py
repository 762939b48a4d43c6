"""Every rank on this machine: one process per rank, CUDA device = local rank.

Knows nothing of how processes are started or watched. Imports no torch.
"""

import os
from dataclasses import dataclass

from core.config import AppConfig
from core.errors import ConfigError, ResourceError
from core.interfaces.launcher import Machine, Placement, Site
from core.parallel.plan import Plan

WAITING_VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
# How long an OpenMP thread spins for its siblings before it sleeps. By default it spins for
# milliseconds, and where another process wants a core, all threads wait for the one that lost its
# own: on two cores a step of 22 ms then took 950 ms, with this value 68 ms (and 22.5 ms alone).
SPIN_COUNT = "10000"


@dataclass(slots=True, kw_only=True)
class LocalOptions:
    """launch.options of `local`."""

    pin_cpus: bool = False  # give each worker its own CPUs, for machines of several sockets


class LocalLauncher:
    """The factory behind launch=local."""

    def __init__(self, options: LocalOptions, config: AppConfig) -> None:
        """Raises ConfigError for settings that need more than one machine."""
        launch = config.launch
        problems = []
        if launch.nnodes != 1:
            problems.append(f"launch.nnodes={launch.nnodes}")
        if launch.dist_init_addr is not None:
            problems.append(f"launch.dist_init_addr={launch.dist_init_addr}")
        if problems:
            raise ConfigError(
                f"{' and '.join(problems)}: launch=local starts every rank on this machine; "
                "leave it out, or choose a launcher for several nodes with launch=..."
            )
        self._options = options
        self._threads_per_worker = launch.threads_per_worker

    def site(self) -> Site:
        """The only node there is."""
        return Site()

    def placements(self, plan: Plan, machine: Machine) -> list[Placement]:
        """All ranks of the plan. CPU threads are shared out evenly, at least one each."""
        num_workers = plan.world_size
        if machine.device == "cuda" and num_workers > machine.num_devices:
            raise ResourceError(
                f"the plan needs {num_workers} CUDA devices (parallel.tp), one for each rank, "
                f"but this machine offers {machine.num_devices}; lower parallel.tp or widen "
                "CUDA_VISIBLE_DEVICES"
            )
        share = len(machine.cpus) // num_workers
        if self._options.pin_cpus and share == 0:
            raise ResourceError(
                f"launch.options.pin_cpus=true needs a CPU for each of {num_workers} ranks, but "
                f"this process may use {len(machine.cpus)}; set it to false"
            )
        num_threads = self._threads_per_worker or max(1, share)
        return [
            Placement(
                rank=rank,
                local_rank=rank,
                device=f"cuda:{rank}" if machine.device == "cuda" else machine.device,
                num_threads=num_threads,
                cpus=(
                    machine.cpus[rank * share : (rank + 1) * share]
                    if self._options.pin_cpus
                    else None
                ),
                env=_thread_environment(num_threads),
            )
            for rank in range(num_workers)
        ]


def _thread_environment(num_threads: int) -> dict[str, str]:
    """Variables of the libraries that compute in threads; the user's own waiting policy stays."""
    env = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    if not WAITING_VARIABLES & os.environ.keys():
        env["GOMP_SPINCOUNT"] = SPIN_COUNT
    return env
