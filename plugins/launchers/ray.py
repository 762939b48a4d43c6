"""Nodes of an existing Ray cluster: this process reserves them and starts the same command on each.

One actor a node, in a placement group that puts each on another node; the actor starts
`python -m core.run ... launch=static` with its rank. From there on the nodes are as without Ray:
workers, sockets and tensors are ours. This process only watches; when one node ends, all end.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from core.errors import ConfigError, ResourceError
from core.settings.config import TOKEN_VARIABLE, AppConfig
from plugins.launchers._node import NodeOptions, ranks_per_node
from plugins.launchers._ray_node import NodeProcess

PASSED_VARIABLES = (TOKEN_VARIABLE, "NODEWEAVE_API_KEY")
# Settings that this launcher gives anew for every node.
_REPLACED = re.compile(
    r"\+{0,2}launch(\.(name|nnodes|node_rank|dist_init_addr|options(\.[^=]*)?))?="
)
CONNECT_S = 5.0
_ADDRESS = re.compile(r"([^:/@\s]+|\[[0-9a-fA-F:.%\w]+\]):[0-9]{1,5}")
POLL_S = 0.2
OWN_END_S = 5.0  # for the other nodes to find out by themselves that one has ended
KILL_AFTER_S = 10.0  # beyond launch.shutdown_grace_s


@dataclass(slots=True, kw_only=True)
class RayOptions(NodeOptions):
    """launch.options of `ray`."""

    address: str = "auto"  # of the Ray cluster; auto: the one this machine is part of
    base_port: int = 20000  # first port of the run, on node 0 (see core.cluster.nodes.ports)
    gpus_per_node: int | None = None  # reserved; None: one a rank where the cluster has GPUs
    cpus_per_node: float = 1.0  # reserved
    resources: dict[str, float] = field(default_factory=dict)  # further ones, reserved on each node
    placement_timeout_s: float = 60.0  # for Ray to find room

    def __post_init__(self) -> None:
        if self.address != "auto" and not _ADDRESS.fullmatch(self.address):
            raise ValueError(
                f"address={self.address!r}: expected auto, or HOST:PORT of the cluster's head (a "
                "ray:// client is no part of the cluster, and can't be used)"
            )
        if not 1 <= self.base_port <= 65535:
            raise ValueError(f"base_port={self.base_port} is out of range; allowed: 1 to 65535")
        if self.cpus_per_node < 0 or (self.gpus_per_node or 0) < 0:
            raise ValueError("cpus_per_node and gpus_per_node must be at least 0")
        if self.placement_timeout_s <= 0:
            raise ValueError(f"placement_timeout_s={self.placement_timeout_s} must be above 0")


class RayLauncher:
    """The factory behind launch=ray: a core.interfaces.launcher.RemoteLauncher."""

    def __init__(self, options: RayOptions, config: AppConfig, module: str = "core.run") -> None:
        """`module` is what nodes run. Raises ConfigError for settings that Ray decides."""
        launch = config.launch
        if launch.node_rank != 0 or launch.dist_init_addr is not None:
            raise ConfigError(
                "launch=ray numbers the nodes and finds node 0 itself; leave launch.node_rank and "
                "launch.dist_init_addr out (launch.options.base_port sets the port)"
            )
        self._num_local = ranks_per_node(config.parallel.tp, launch.nnodes)
        self._options = options
        self._config = config
        self._module = module

    def drive(self, words: Sequence[str]) -> int:
        """Start the command on `launch.nnodes` Ray nodes and wait; returns the exit status of the
        first node that ended badly, or 0. SIGINT and SIGTERM end all nodes."""
        ray = _import_ray()
        # Secrets go in an actor call: a runtime environment is shown on dashboards.
        env = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        self._connect(ray)
        try:
            nodes, host = self._reserve(ray)
            rendezvous = f"{f'[{host}]' if ':' in host else host}:{self._options.base_port}"
            with _signals() as signals_seen:
                running = {
                    node.run.remote(
                        self._module,
                        node_words(words, self._config, rank, rendezvous),
                        env,
                        os.getcwd(),
                    ): rank
                    for rank, node in enumerate(nodes)
                }
                return self._watch(ray, nodes, running, signals_seen)
        finally:
            ray.shutdown()  # ends the actors and frees what was reserved

    def _connect(self, ray: Any) -> None:
        """Join the Ray cluster as a driver. Raises ResourceError where there is none."""
        address = self._options.address
        try:
            host, colon, port = address.rpartition(":")
            if colon:  # Ray itself would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            ray.init(address=address, logging_level="warning")
        except (OSError, RuntimeError) as error:  # not there; of another version
            raise ResourceError(
                f"launch=ray can't join a Ray cluster (launch.options.address={address}): "
                f"{str(error).splitlines()[0]}\nstart one with `ray start --head` on one machine "
                "and `ray start --address=HOST:6379` on the others, in the version installed here"
            ) from error

    def _reserve(self, ray: Any) -> tuple[list[Any], str]:
        """An actor on each of the nodes, and node 0's address. Raises ResourceError where Ray has
        no room."""
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        nnodes, options = self._config.launch.nnodes, self._options
        num_gpus = self._num_gpus(ray.cluster_resources())
        bundle = {"CPU": options.cpus_per_node, "GPU": num_gpus, **options.resources}
        bundle = {name: amount for name, amount in bundle.items() if amount}
        if not bundle:
            raise ConfigError(
                "launch=ray reserves nothing; set launch.options.cpus_per_node above 0"
            )
        group = placement_group([bundle] * nnodes, strategy="STRICT_SPREAD")
        if not group.wait(options.placement_timeout_s):
            present = len([node for node in ray.nodes() if node["Alive"]])
            raise ResourceError(
                f"Ray found no room for {nnodes} nodes with {bundle} each (launch.nnodes, "
                f"launch.options) within {options.placement_timeout_s:g} s; it has {present} "
                f"nodes, free in all: {ray.available_resources()}"
            )
        actor = ray.remote(NodeProcess)
        nodes = [
            actor.options(
                num_cpus=options.cpus_per_node,
                num_gpus=num_gpus,
                resources=options.resources,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(nnodes)
        ]
        hosts = ray.get([node.host_name.remote() for node in nodes])
        first_id = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
        (address,) = (
            node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == first_id
        )
        for rank, host in enumerate(hosts):
            print(f"node {rank}: {host}", file=sys.stderr)
        return nodes, address

    def _num_gpus(self, cluster: dict[str, float]) -> int:
        if self._options.gpus_per_node is not None:
            return self._options.gpus_per_node
        computes_on_cpu = self._config.engine.device == "cpu" or not cluster.get("GPU")
        return 0 if computes_on_cpu else self._num_local

    def _watch(
        self, ray: Any, nodes: list[Any], running: dict[Any, int], signals_seen: list[int]
    ) -> int:
        """Wait for all; once one has ended, or at a signal, end the others."""
        status = 0
        pending = list(running)
        patience = _Patience(
            [node.stop for node in nodes], self._config.launch.shutdown_grace_s + KILL_AFTER_S
        )
        while pending:
            ended, pending = ray.wait(pending, num_returns=1, timeout=POLL_S)
            for reference in ended:
                node_status, report = _outcome(ray, reference, running[reference])
                status = status or node_status
                if report:
                    print(report, file=sys.stderr)
            patience.look(one_ended=bool(ended), num_signals=len(signals_seen))
        return status


class _Patience:
    """Ends the nodes step by step: once one has ended the others may end by themselves, then they
    are asked, then killed. A signal asks at once, a second one kills."""

    def __init__(self, stops: list[Any], kill_after_s: float) -> None:
        self._stops = stops
        self._kill_after_s = kill_after_s
        self._ask_at = self._kill_at = float("inf")
        self._asked = self._killed = False

    def look(
        self, one_ended: bool, num_signals: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        now = clock()
        if one_ended:
            self._ask_at = min(self._ask_at, now + OWN_END_S)
        if not self._asked and (now >= self._ask_at or num_signals > 0):
            self._asked = True
            self._kill_at = now + self._kill_after_s
            for stop in self._stops:
                stop.remote()
        if not self._killed and self._asked and (now >= self._kill_at or num_signals > 1):
            self._killed = True
            for stop in self._stops:
                stop.remote(kill=True)


def node_words(
    words: Sequence[str], config: AppConfig, node_rank: int, rendezvous: str
) -> list[str]:
    """The command of one node: the words typed, but with launch=static and its place."""
    launch = config.launch
    kept = [word for word in words if not _REPLACED.match(word)]
    place = ["launch=static", f"launch.nnodes={launch.nnodes}"]
    if launch.nnodes > 1:
        place += [f"launch.node_rank={node_rank}", f'launch.dist_init_addr="{rendezvous}"']
    if launch.options.get("pin_cpus"):
        place.append("launch.options.pin_cpus=true")
    return [*kept, *place]


def _outcome(ray: Any, reference: Any, rank: int) -> tuple[int, str]:
    """A node's exit status, and what to say of it if it is not 0."""
    try:
        status, lines = ray.get(reference)
    except ray.exceptions.RayError as error:  # the actor or its machine is gone
        return 1, f"error: node {rank} is gone: {str(error).splitlines()[0]}"
    if status == 0:
        return 0, ""
    status = status if status > 0 else 128 - status  # of a signal: as shells have it
    last = "".join(f"\n  {line}" for line in lines)
    return status, f"error: node {rank} ended with status {status}; its last lines:{last}"


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util
    except ImportError as error:
        raise ConfigError(
            f"launch=ray needs Ray, which can't be imported ({error}): pip install "
            "'nodeweave[ray]', in the version of the cluster"
        ) from error
    return ray


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that come meanwhile, as a list that grows."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
