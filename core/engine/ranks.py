"""Joins the ranks of a plan: comm plugins over the mesh's process groups."""

import torch

from core.config import AppConfig, PluginChoice
from core.interfaces.comm import CommBackend, Comms, connect
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.plugin_manager import PluginManager

# The mesh axes that models and engine communicate over, by the config key that chooses how.
KIND_OF_AXIS = {
    "tp": "tp",
    "dp": "tp",
    "dense": "tp",
    "world": "tp",
    "ep": "ep",
    "tp_expert": "ep",
}


def join_ranks(
    config: AppConfig,
    plan: Plan,
    rank: int,
    plugins: PluginManager,
    rendezvous: str,
    device: torch.device,
) -> Comms:
    """Wait for the other ranks and wrap every axis in the plugin chosen for it.

    An axis of one rank needs no plugin. Raises ResourceError naming ranks that did not come.
    """
    choices: dict[str, tuple[str, PluginChoice]] = {
        axis: (f"comm.{kind}", getattr(config.comm, kind)) for axis, kind in KIND_OF_AXIS.items()
    }
    table = plugins.table("comm")
    backends: dict[str, CommBackend] = {
        axis: table.create(choice, key=key)
        for axis, (key, choice) in choices.items()
        if plan.axis_size(axis) > 1
    }
    mesh = open_mesh(
        plan,
        rank,
        torch_backends={
            axis: backends[axis].torch_backend if axis in backends else "" for axis in choices
        },
        rendezvous=rendezvous,
        timeout_s=config.launch.startup_timeout_s,
        device=device,
    )
    return connect(mesh.groups, backends)
