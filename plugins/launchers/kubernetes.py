"""A pod as a node: its place is read from what Kubernetes tells the container.

Two ways: the variables of a LeaderWorkerSet, which say everything; or the index of a pod of a
StatefulSet or an Indexed Job (the number its name ends with, or JOB_COMPLETION_INDEX), with the
headless service that gives pod 0 a name in `launch.options.service`. Pod 0 itself takes its address
from POD_IP where that is passed: its own name may not be known yet. Talks to no API server.
Sources: LeaderWorkerSet (lws.sigs.k8s.io), "StatefulSets: Pod identity" and "Indexed Jobs" in the
Kubernetes documentation.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.config import AppConfig
from plugins.launchers._node import NodeLauncher, NodeOptions, require_unset

LWS_VARIABLES = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


@dataclass(slots=True, kw_only=True)
class KubernetesOptions(NodeOptions):
    """launch.options of `kubernetes`."""

    base_port: int = 20000  # first port of the run, on node 0 (see core.cluster.nodes.ports)
    service: str | None = None  # headless service of the pods; a LeaderWorkerSet brings its own
    namespace: str | None = None  # of the service; None: the pod's own, by its search domains

    def __post_init__(self) -> None:
        if not 1 <= self.base_port <= 65535:
            raise ValueError(f"base_port={self.base_port} is out of range; allowed: 1 to 65535")
        for name, value in (("service", self.service), ("namespace", self.namespace)):
            if value is not None and not _DNS_NAME.fullmatch(value):
                raise ValueError(f"{name}={value!r} is not a name in Kubernetes")


def make_launcher(options: KubernetesOptions, config: AppConfig) -> NodeLauncher:
    """The factory behind launch=kubernetes. Raises ConfigError where the pod's place can't be
    told."""
    return NodeLauncher(find_site(options, config, os.environ), options, config)


def find_site(options: KubernetesOptions, config: AppConfig, env: Mapping[str, str]) -> Site:
    """This pod's place, from its environment."""
    launch = config.launch
    if any(name in env for name in LWS_VARIABLES):
        missing = [name for name in LWS_VARIABLES if not env.get(name)]
        if missing:
            raise ConfigError(
                f"launch=kubernetes: of a LeaderWorkerSet's variables {', '.join(missing)} "
                "is not set; pass all three to the container, or none"
            )
        nnodes, node_rank = _number(env, "LWS_GROUP_SIZE"), _number(env, "LWS_WORKER_INDEX")
        require_unset("kubernetes", launch, nnodes, node_rank)
        leader = env["LWS_LEADER_ADDRESS"]
    else:
        nnodes, node_rank = launch.nnodes, _index(env)
        require_unset("kubernetes", launch, nnodes, node_rank)
        leader = "" if nnodes == 1 or launch.dist_init_addr else _first_pod(options, env)
    if not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"launch=kubernetes: this pod has index {node_rank}, and the run has {nnodes} nodes; "
            "set launch.nnodes to the number of pods (replicas, or completions of an Indexed Job)"
        )
    if nnodes == 1:
        return Site()
    if node_rank == 0 and env.get("POD_IP"):
        address = env["POD_IP"]
        leader = f"[{address}]" if ":" in address else address
    rendezvous = launch.dist_init_addr or f"{leader}:{options.base_port}"
    return Site(nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)


def _index(env: Mapping[str, str]) -> int:
    """The pod's number among its siblings, from 0."""
    if "JOB_COMPLETION_INDEX" in env:
        return _number(env, "JOB_COMPLETION_INDEX")
    return int(_split_name(env)[1])


def _first_pod(options: KubernetesOptions, env: Mapping[str, str]) -> str:
    """The DNS name of the pod with index 0."""
    if options.service is None:
        raise ConfigError(
            "launch=kubernetes needs launch.options.service=NAME, the headless service of the "
            "pods, to reach pod 0 (a LeaderWorkerSet brings its own)"
        )
    domain = f".{options.namespace}.svc" if options.namespace else ""
    return f"{_split_name(env)[0]}-0.{options.service}{domain}"


def _split_name(env: Mapping[str, str]) -> tuple[str, str]:
    """The set's name and the pod's number, of "name-3". (In an Indexed Job only the host name is
    of this form; the pod's name has a random end.)"""
    named = "POD_NAME" in env and "JOB_COMPLETION_INDEX" not in env
    variable = "POD_NAME" if named else "HOSTNAME"
    name = env.get(variable, "")
    base, _, number = name.rpartition("-")
    if not base or not (number.isascii() and number.isdecimal()):
        raise ConfigError(
            f"launch=kubernetes: {variable}={name!r} ends with no index; run it in a "
            "LeaderWorkerSet, a StatefulSet or an Indexed Job (where the pod's host name is "
            "changed, pass metadata.name as POD_NAME), or use launch=static"
        )
    return base, number


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name]
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"launch=kubernetes: {name}={text!r} is not a number")
    return int(text)
