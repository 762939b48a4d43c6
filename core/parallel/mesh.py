"""Process groups of a plan: the only place that makes them. Knows no comm plugin, no layer.

With one rank nothing is initialised and torch.distributed is not imported. On one host the ranks
meet through a file in the private run directory, so that no port is open for it; the collectives'
own connections stay on the loopback interface. On several they bring a store.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ResourceError
from core.parallel.doors import closed_afterwards
from core.parallel.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class Mesh:
    """The process groups of one rank, by axis. Owns them: close it once, at the end."""

    plan: Plan
    rank: int
    groups: Mapping[str, "ProcessGroup | None"]
    store: "Store | None" = None  # torch holds a store that is written in Python only half

    def group(self, axis: str) -> "ProcessGroup | None":
        """The torch.distributed group this rank belongs to along `axis`; None where it has no
        peers there. Raises KeyError for an axis that was not opened."""
        return self.groups[axis]

    def close(self) -> None:
        """Leave every group. Blocks for no peer; collectives are not possible after it."""
        if any(group is not None for group in self.groups.values()):
            import torch.distributed as dist

            dist.destroy_process_group()


def open_mesh(
    plan: Plan,
    rank: int,
    *,
    torch_backends: Mapping[str, str],
    rendezvous: "str | Path | Store",
    timeout_s: float,
    collective_timeout_s: float = 1800.0,
    device: "torch.device | None" = None,
) -> Mesh:
    """Meet the other ranks and make a group for every axis in `torch_backends` ("tp": "gloo").

    Every rank calls this with the same arguments (but `rank` and `device`). `rendezvous` is a
    path that no file exists at, in a folder only this user can write (ranks of one host), or this
    rank's view of a store that all of them reach. Blocks until all ranks came, at most
    `timeout_s`: then ResourceError names the missing ones. A collective waits
    `collective_timeout_s` for its slowest rank. `device` is where this rank computes; gloo does not
    need it.
    """
    axes = [axis for axis in sorted(torch_backends) if plan.axis_size(axis) > 1]
    if not axes:
        return Mesh(plan, rank, dict.fromkeys(torch_backends))
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    store = _meet(plan.world_size, rank, rendezvous, timeout_s)
    everyone = tuple(range(plan.world_size))
    # The world group is that of the first axis which spans it, so that it is used at all.
    spanning = [axis for axis in axes if plan.axis_size(axis) == plan.world_size]
    world_backend = torch_backends[(spanning or axes)[0]]
    timeout = timedelta(seconds=collective_timeout_s)
    arguments: dict[str, Any] = {}
    if device is not None and device.type == "cuda" and world_backend != "gloo":
        arguments["device_id"] = device
    with _only_peers(world_backend):
        dist.init_process_group(
            world_backend,
            store=PrefixStore("groups", store),
            rank=rank,
            world_size=plan.world_size,
            timeout=timeout,
            **arguments,
        )
    assert dist.group.WORLD is not None
    made: dict[tuple[str, tuple[int, ...]], ProcessGroup] = {
        (world_backend, everyone): dist.group.WORLD
    }
    groups: dict[str, ProcessGroup | None] = dict.fromkeys(torch_backends)
    for axis in axes:
        backend = torch_backends[axis]
        for members in plan.groups(axis):  # in one order everywhere, also where not a member
            key = (backend, tuple(members))
            if key not in made:
                with _only_peers(backend):
                    made[key] = dist.new_group(members, timeout=timeout, backend=backend)
            if rank in members:
                groups[axis] = made[key]
    return Mesh(plan, rank, groups, store)


def _only_peers(backend: str) -> AbstractContextManager[None]:
    """Makes a group that nobody can connect to afterwards, where that is known to need no more."""
    return closed_afterwards() if backend == "gloo" else nullcontext()


def _meet(
    world_size: int, rank: int, rendezvous: "str | Path | Store", timeout_s: float
) -> "Store":
    """A store that all ranks reached. Raises ResourceError naming the ranks that did not."""
    # A documented name of torch.distributed; its type hints don't export it.
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    deadline = time.monotonic() + timeout_s
    limit = timedelta(seconds=timeout_s)
    store: Store
    if isinstance(rendezvous, str | Path):
        _stay_on_loopback()
        store = FileStore(str(rendezvous), world_size)
    else:
        store = rendezvous
    store.set_timeout(limit)
    try:
        store.set(f"here/{rank}", "")
    except RuntimeError as error:
        raise ResourceError(
            f"rank {rank} can't meet the others within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}; look above for what stopped or delayed it"
        ) from error
    waiting = [f"here/{peer}" for peer in range(world_size)]
    try:
        store.wait(waiting, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
    except RuntimeError as error:
        missing = [str(peer) for peer, key in enumerate(waiting) if not store.check([key])]
        if not missing:
            return store  # the last one came between the deadline and the check
        raise ResourceError(
            f"rank {rank} waited {timeout_s:g} s for the other workers; missing: rank "
            f"{', '.join(missing)} of {world_size}. Look for what stopped or delayed them above"
        ) from error
    return store


def _stay_on_loopback() -> None:
    """Keep the collectives' sockets off the network, unless the user names an interface."""
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        for variable in _INTERFACE_VARIABLES:
            os.environ.setdefault(variable, loopback)
