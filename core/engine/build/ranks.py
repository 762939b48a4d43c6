"""Joins the ranks of a plan: comm plugins over the mesh's process groups."""

import torch
from torch.distributed.distributed_c10d import Store

from core.engine.build.rank_store import RankStore, StoreHub
from core.errors import ConfigError
from core.interfaces.comm import (
    CommBackend,
    Comms,
    Communicator,
    SoloCommunicator,
    StandInBackend,
    connect,
)
from core.interfaces.control import Endpoints
from core.parallel.mesh import open_mesh
from core.parallel.plan import AXES, Plan
from core.plugin.plugin_manager import PluginManager
from core.settings.config import AppConfig, PluginChoice

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
    endpoints: Endpoints,
    device: torch.device,
) -> Comms:
    """Wait for the other ranks and wrap every axis in the plugin chosen for it.

    An axis of one rank needs no plugin. Raises ResourceError naming ranks that did not come.
    """
    choices = _choices(config)
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
        rendezvous=_meeting_place(endpoints, rank),
        timeout_s=config.launch.startup_timeout_s,
        device=device,
    )
    return connect(mesh.groups, backends)


def _meeting_place(endpoints: Endpoints, rank: int) -> str | Store:
    """A path on one host; between nodes a store, which rank 0 keeps until its process ends.
    Raises ResourceError where its address is taken."""
    if not endpoints.store.startswith("tcp://"):
        return endpoints.store
    if rank == 0:
        StoreHub(endpoints.store, endpoints.key)
    return RankStore(endpoints.store, endpoints.key, f"rank {rank}")


def stand_in_for_peers(config: AppConfig, plan: Plan, rank: int, plugins: PluginManager) -> Comms:
    """Every axis of one rank whose peers are not there, and are not waited for.

    Raises ConfigError for a comm plugin that can't do without them.
    """
    table = plugins.table("comm")
    axes: dict[str, Communicator] = {}
    for axis in AXES:
        axes[axis] = SoloCommunicator()
        size = plan.axis_size(axis)
        if size == 1 or axis not in KIND_OF_AXIS:
            continue
        key, choice = _choices(config)[axis]
        backend = table.create(choice, key=key)
        if not isinstance(backend, StandInBackend):
            raise ConfigError(
                f"{key}={choice.name} needs all {plan.world_size} ranks of the plan; one of them "
                f"can be run alone with comm=emulated"
            )
        axes[axis] = backend.stand_in(plan.axis_index(axis, rank), size)
    return Comms(axes)


def _choices(config: AppConfig) -> dict[str, tuple[str, PluginChoice]]:
    """By axis: the config key that chooses its plugin, and the choice."""
    return {
        axis: (f"comm.{kind}", getattr(config.comm, kind)) for axis, kind in KIND_OF_AXIS.items()
    }
