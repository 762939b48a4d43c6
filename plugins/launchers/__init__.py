"""Launchers: how a node learns its place. `static` is told; `slurm` and `kubernetes` read their
environment; `ray` starts the nodes itself; `local` is one machine and refuses more.
"""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from plugins.launchers._node import NodeOptions
from plugins.launchers.kubernetes import KubernetesOptions
from plugins.launchers.ray import RayOptions
from plugins.launchers.slurm import SlurmOptions


@hookimpl
def register_launcher() -> Sequence[Registration]:
    """The launchers in this package."""
    return [
        Registration(
            name="static",
            factory="plugins.launchers.static:make_launcher",
            config=NodeOptions,
            summary="this machine, or nodes that are told their rank and where node 0 is",
        ),
        Registration(
            name="local",
            factory="plugins.launchers.local:make_launcher",
            config=NodeOptions,
            summary="every rank on this machine, one process each",
        ),
        Registration(
            name="slurm",
            factory="plugins.launchers.slurm:make_launcher",
            config=SlurmOptions,
            summary="nodes of a Slurm job, from the variables that srun sets",
        ),
        Registration(
            name="kubernetes",
            factory="plugins.launchers.kubernetes:make_launcher",
            config=KubernetesOptions,
            summary="pods of a LeaderWorkerSet, StatefulSet or Indexed Job",
        ),
        Registration(
            name="ray",
            factory="plugins.launchers.ray:RayLauncher",
            config=RayOptions,
            summary="nodes of an existing Ray cluster, started from here",
        ),
    ]
