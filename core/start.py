"""From a composed configuration to a served model: find files, settle the plan, start processes.

The parent of everything: it imports no torch and computes nothing itself. The frontend starts
beside the workers, so that a port in use is found before weights are loaded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from core.cluster.boot import FrontendBoot, Served, WorkerBoot
from core.cluster.display import Display, SummaryInfo
from core.cluster.endpoints import RunDirectory
from core.cluster.machine import find_machine
from core.cluster.process import ProcessSpec
from core.cluster.supervisor import Supervisor
from core.config import AppConfig, PluginChoice
from core.interfaces.control import ModelFiles, Progress, Ready
from core.interfaces.launcher import Launcher, Placement
from core.loading.files import resolve_files
from core.plugin_manager import PluginManager
from core.resolve import Resolved, resolve

FRONTEND = "frontend"


def start(config: AppConfig, plugins: PluginManager) -> int:
    """Serve until told to stop; returns the exit status. Raises NodeweaveError where the
    configuration does not fit the model or this machine; nothing is started then."""
    begin = time.monotonic()
    display = Display()
    launcher: Launcher = plugins.table("launcher").create(
        PluginChoice(name=config.launch.name, options=config.launch.options), config
    )
    launcher.site()
    machine = find_machine(config.engine.device)
    files = resolve_files(config.model, _progress(display))
    resolved = resolve(config, plugins, files, machine.device)
    placements = launcher.placements(resolved.plan, machine)
    display.num_workers = len(placements)
    with RunDirectory(resolved.plan.dp) as run_directory:
        supervisor = Supervisor(
            [
                _frontend(resolved, run_directory),
                *(_worker(resolved, run_directory, placement) for placement in placements),
            ],
            config.launch,
            on_status=display.status,
            on_ready=lambda ready: display.summary(
                _summary(resolved, ready, display.phases, placements, time.monotonic() - begin)
            ),
            on_error=display.error,
        )
        return supervisor.run()


def _progress(display: Display) -> Callable[[str, int, int, str], None]:
    def show(task: str, done: int, total: int, unit: str) -> None:
        display.status("this process", Progress(task, done, total, unit))

    return show


def _frontend(resolved: Resolved, run_directory: RunDirectory) -> ProcessSpec:
    boot = FrontendBoot(
        config=resolved.config,
        endpoints=run_directory.endpoints(),
        files=resolved.files,
        served=Served(
            name=_served_name(resolved.config),
            max_model_len=resolved.max_model_len,
            vocab_size=resolved.spec.vocab_size,
            info=_public_info(resolved),
        ),
    )
    return ProcessSpec(
        name=FRONTEND,
        module="core.serve.process",
        boot=msgspec.json.encode(boot),
        is_worker=False,
    )


def _worker(resolved: Resolved, run_directory: RunDirectory, placement: Placement) -> ProcessSpec:
    boot = WorkerBoot(
        config=resolved.config,
        plan=resolved.plan,
        rank=placement.rank,
        device=placement.device,
        num_threads=placement.num_threads,
        local_ranks=resolved.plan.world_size,
        files=resolved.files,
        endpoints=run_directory.endpoints(),
        rendezvous=str(run_directory.rendezvous),
    )
    return ProcessSpec(
        name=f"worker {placement.rank}",
        module="core.worker",
        boot=msgspec.json.encode(boot),
        env=placement.env,
        is_worker=True,
        cpus=placement.cpus,
    )


def _served_name(config: AppConfig) -> str:
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
            "max_running_requests": config.engine.max_running_requests,
            "chunked_prefill_size": config.engine.chunked_prefill_size,
            "max_prefill_tokens": config.engine.max_prefill_tokens,
            "prefix_cache": not config.engine.disable_prefix_cache,
        },
    }


def _summary(
    resolved: Resolved,
    ready: Mapping[str, Ready],
    phases: Mapping[str, float],
    placements: Sequence[Placement],
    total_s: float,
) -> SummaryInfo:
    workers = [status.info for name, status in ready.items() if name != FRONTEND]
    frontend = ready[FRONTEND].info
    leader = workers[0]
    return SummaryInfo(
        served_name=_served_name(resolved.config),
        architecture=resolved.spec.architecture,
        num_parameters=leader["num_parameters"],
        dtype=leader["dtype"],
        file_bytes=_file_bytes(resolved.files),
        plan=f"{resolved.config.parallel.plan}={resolved.plan.tp_attn}",
        devices=_devices(placements),
        num_ranks=len(placements),
        kv_tokens=leader["kv_cache_tokens"],
        kv_bytes=sum(info["kv_pool_bytes"] for info in workers),
        phases=phases,
        total_s=total_s,
        url=frontend["url"],
        needs_key=frontend["needs_key"],
    )


def _devices(placements: Sequence[Placement]) -> str:
    first = placements[0]
    if first.device != "cpu":
        return ", ".join(placement.device for placement in placements)
    return f"cpu, {first.num_threads} {'thread' if first.num_threads == 1 else 'threads'} each"


def _file_bytes(files: ModelFiles) -> int:
    return sum(Path(path).stat().st_size for path in files.weight_files)
