"""From a composed configuration to a served model: find files, settle the plan, start processes.

The parent of everything on its node: it imports no torch and computes nothing itself. The frontend
(node 0's) starts beside the workers, so that a port in use is found before weights are loaded.
Where there are several nodes, each runs this with the same configuration, and they compare what
they found before any process is started.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from core.cluster.nodes.endpoints import RunDirectory, node_endpoints
from core.cluster.nodes.facts import gather
from core.cluster.nodes.network import interface_environment, interface_text, require_free
from core.cluster.nodes.ports import Ports, listeners
from core.cluster.nodes.rendezvous import meet
from core.cluster.processes.boot import FrontendBoot, Served, WorkerBoot, worker_name
from core.cluster.processes.display import Display, SummaryInfo
from core.cluster.processes.group import Group
from core.cluster.processes.log_stream import steady_output
from core.cluster.processes.machine import find_machine
from core.cluster.processes.process import ProcessSpec
from core.cluster.processes.supervisor import Supervisor
from core.interfaces.control import Endpoints, ModelFiles, Progress, Ready
from core.interfaces.launcher import Launcher, Machine, Placement, Site
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.resolve import Resolved, resolve
from core.settings.config import AppConfig, EngineConfig
from core.sources.files import resolve_files

FRONTEND = "frontend"
LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"
_MAX_WAITED_FOR = 3  # processes named in one line; of hundreds of ranks


def start(config: AppConfig, plugins: PluginManager, launcher: Launcher) -> int:
    """Serve until told to stop; returns the exit status. Raises NodeweaveError where the
    configuration does not fit the model, this machine or the other nodes; nothing is started then.
    """
    begin_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(steady_output())
        display = Display()
        display.note(f"starting {served_name(config)}: looking for the model's files")
        group = stack.enter_context(meet(launcher.site(), config, display))
        node = prepare(config, plugins, launcher, group, display)
        display.num_workers = node.resolved.plan.world_size
        endpoints = _agree(node, plugins, group, display)
        if endpoints is None:
            endpoints = stack.enter_context(RunDirectory(node.resolved.plan.dp)).endpoints()
        return _supervise(node, endpoints, group, display, begin_s, lambda: log.dropped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node is going to run."""

    resolved: Resolved
    machine: Machine
    placements: Sequence[Placement]


def prepare(
    config: AppConfig, plugins: PluginManager, launcher: Launcher, group: Group, display: Display
) -> Node:
    """Find the model's files and settle everything. Starts nothing; raises NodeweaveError where
    the configuration does not fit the model or this machine."""
    group.enter("find the model's files")
    config = _at(group.site, config)
    machine = find_machine(config.engine.device)
    files = resolve_files(config.model, plugins, _progress(display, group))
    resolved = resolve(config, plugins, files, machine.device, machine.dtypes, machine.device_bytes)
    if group.site.node_rank == 0:
        for warning in (*files.warnings, *resolved.spec.warnings):
            display.note(f"warning: {warning}")
    placements = launcher.placements(resolved.plan, machine)
    return Node(resolved=resolved, machine=machine, placements=placements)


def _at(site: Site, config: AppConfig) -> AppConfig:
    """The configuration with the place that the launcher found, which a batch system may have told
    it and not the user: what depends on the number of nodes reads `launch.nnodes`."""
    launch = dataclasses.replace(config.launch, nnodes=site.nnodes, node_rank=site.node_rank)
    return dataclasses.replace(config, launch=launch)


def _agree(node: Node, plugins: PluginManager, group: Group, display: Display) -> Endpoints | None:
    """Have all nodes compare what must be the same; where their processes meet. None on one node.

    Raises GroupError with all differences, ResourceError for a port that is taken.
    """
    site, plan = group.site, node.resolved.plan
    if site.nnodes == 1:
        return None
    assert site.rendezvous is not None
    ports = Ports.of(site.rendezvous, plan)
    require_free(
        group.address,
        [
            (f"the port of {listener.name}", listener.port)
            for listener in listeners(ports, plan, site.nnodes)
            if listener.node == site.node_rank and listener.port != ports.control
        ],
    )
    group.enter("check files")
    facts = gather(
        node.resolved.config,
        plugins.fingerprint(),
        node.resolved.files,
        node.machine,
        _progress(display, group),
    )
    group.enter("compare")
    addresses = group.agree(facts)
    return node_endpoints(plan, ports, addresses, group.wire_key)


def _supervise(
    node: Node,
    endpoints: Endpoints,
    group: Group,
    display: Display,
    begin_s: float,
    dropped_lines: Callable[[], int],
) -> int:
    """Start this node's processes and stay until they ended."""
    site, resolved = group.site, node.resolved
    several, leads = site.nnodes > 1, site.node_rank == 0
    environment: dict[str, str] = {}
    if several:
        address = group.address
        environment = interface_environment(address)
        if LOG_VARIABLE not in os.environ:  # torch warns, of every rank, that addresses lack names
            environment[LOG_VARIABLE] = "ERROR"
        display.note(f"collectives use {interface_text(address)}")

    def on_ready(ready: Mapping[str, Ready]) -> None:
        if leads:
            total_s = time.monotonic() - begin_s
            display.summary(_summary(node, site.nnodes, ready, display.phases, total_s))
        else:
            ranks = ", ".join(str(placement.rank) for placement in node.placements)
            display.note(f"node {site.node_rank} is ready: ranks {ranks}; node 0 serves")

    def on_waiting(lines: Sequence[str]) -> None:
        if several and leads:
            display.waiting(_waiting_text(lines))

    supervisor = Supervisor(
        [
            *([_frontend(resolved, endpoints)] if leads else []),
            *(
                worker_spec(
                    node, endpoints, placement, site.node_rank if several else None, environment
                )
                for placement in node.placements
            ),
        ],
        resolved.config.launch,
        on_status=display.status if leads else lambda name, status: None,  # one view, on node 0
        on_ready=on_ready,
        on_error=display.error,
        on_waiting=on_waiting,
        dropped_lines=dropped_lines,
        group=group,
    )
    return supervisor.run()


def _waiting_text(lines: Sequence[str]) -> str:
    shown = "; ".join(lines[:_MAX_WAITED_FOR])
    more = len(lines) - _MAX_WAITED_FOR
    return f"starting; waiting for {shown}{f'; and {more} more' if more > 0 else ''}"


def _progress(display: Display, group: Group) -> Callable[[str, int, int, str], None]:
    def show(task: str, done: int, total: int, unit: str) -> None:
        display.status("this process", Progress(task, done, total, unit))
        group.progress(task, done, total, unit)

    return show


def frontend_boot(resolved: Resolved, endpoints: Endpoints) -> FrontendBoot:
    """What whoever takes requests needs to know."""
    return FrontendBoot(
        config=resolved.config,
        endpoints=endpoints,
        files=resolved.files,
        served=Served(
            name=served_name(resolved.config),
            max_model_len=resolved.max_model_len,
            vocab_size=resolved.spec.vocab_size,
            info=_public_info(resolved),
        ),
    )


def _frontend(resolved: Resolved, endpoints: Endpoints) -> ProcessSpec:
    return ProcessSpec(
        name=FRONTEND,
        module="core.serve.process",
        boot=msgspec.json.encode(frontend_boot(resolved, endpoints)),
        is_worker=False,
    )


def worker_spec(
    node: Node,
    endpoints: Endpoints,
    placement: Placement,
    node_rank: int | None = None,
    environment: Mapping[str, str] = {},
) -> ProcessSpec:
    """The process of one rank. `node_rank`: where there are several nodes."""
    boot = WorkerBoot(
        config=node.resolved.config,
        plan=node.resolved.plan,
        rank=placement.rank,
        device=placement.device,
        num_threads=placement.num_threads,
        local_ranks=len(node.placements),
        files=node.resolved.files,
        endpoints=endpoints,
    )
    return ProcessSpec(
        name=worker_name(placement.rank),
        module="core.worker",
        boot=msgspec.json.encode(boot),
        env={**environment, **placement.env},
        is_worker=True,
        cpus=placement.cpus,
        node=node_rank,
    )


def served_name(config: AppConfig) -> str:
    """What clients call the model."""
    return config.model.served_name or config.model.name


def _public_info(resolved: Resolved) -> dict[str, object]:
    """What /server_info may tell: sizes and choices, no paths and no secrets."""
    config = resolved.config
    return {
        "architecture": resolved.spec.architecture,
        "parallel": {"plan": config.parallel.plan, "tp": config.parallel.tp},
        "attention": {
            "prefill": config.attention.prefill.name,
            "decode": config.attention.decode.name,
        },
        "engine": {
            "device": config.engine.device,
            "page_size": config.engine.page_size,
            "max_running_requests": config.engine.running_limit,
            "chunked_prefill_size": config.engine.chunked_prefill_size,
            "max_prefill_tokens": config.engine.max_prefill_tokens,
            "prefix_cache": not config.engine.disable_prefix_cache,
        },
    }


def _summary(
    node: Node,
    nnodes: int,
    ready: Mapping[str, Ready],
    phases: Mapping[str, float],
    total_s: float,
) -> SummaryInfo:
    resolved = node.resolved
    plan = resolved.plan
    workers = {name: status.info for name, status in ready.items() if name != FRONTEND}
    frontend = ready[FRONTEND].info
    leader = workers["worker 0"]
    return SummaryInfo(
        served_name=served_name(resolved.config),
        architecture=resolved.spec.architecture,
        num_parameters=leader["num_parameters"],
        dtype=leader["dtype"],
        dtype_reason=resolved.dtype_reason,
        file_bytes=_file_bytes(resolved.files),
        plan=_plan_text(plan),
        devices=_devices(node.placements, nnodes),
        num_ranks=plan.world_size,
        kv_tokens=leader["kv_cache_tokens"] * plan.dp,
        kv_bytes=sum(info["kv_pool_bytes"] for info in workers.values()),
        memory=_memory(leader),
        graphs=leader["cuda_graphs"] if leader["activation_bytes"] else "",
        steps=_steps(resolved.config.engine, leader) if leader["activation_bytes"] else "",
        phases=phases,
        total_s=total_s,
        url=frontend["url"],
        needs_key=frontend["needs_key"],
    )


def _steps(engine: EngineConfig, leader: Mapping[str, Any]) -> str:
    """How large a step of a DP rank may be, and its prompts beside decodes."""
    return (
        f"up to {engine.running_limit} requests and {engine.max_prefill_tokens:,} prompt tokens, "
        f"about {leader['mixed_prefill_tokens']:,} beside decodes while few prompts wait"
    )


def _memory(leader: Mapping[str, Any]) -> dict[str, int]:
    """What a rank holds on its GPU; empty where nothing was measured."""
    if not leader["activation_bytes"]:
        return {}
    shares = {
        "weights": "weight",
        "KV pool": "kv_pool",
        "activations": "activation",
        "CUDA graphs": "graph",
        "slots and buffers": "state",
    }
    return {share: leader[f"{name}_bytes"] for share, name in shares.items()}


def _plan_text(plan: Plan) -> str:
    """ "tp=16 ep=16 dp=8", in the words of the configuration."""
    sizes = {"tp": plan.stage_size, "ep": plan.ep, "dp": plan.dp}
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "tp")


def _devices(placements: Sequence[Placement], nnodes: int) -> str:
    first = placements[0]
    if first.device != "cpu":
        devices = ", ".join(placement.device for placement in placements)
    else:
        threads = "thread" if first.num_threads == 1 else "threads"
        devices = f"cpu, {first.num_threads} {threads} each"
    return devices if nnodes == 1 else f"{nnodes} nodes: {devices}"


def _file_bytes(files: ModelFiles) -> int:
    return sum(Path(path).stat().st_size for path in files.weight_files)
