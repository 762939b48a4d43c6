"""The worker process: one rank of the engine. Started by the supervisor, never by hand.

The leader of each DP rank schedules and talks to the frontend; the others run the steps it sends.
torch is imported inside `run`, so that its seconds are reported as a phase.
"""

import gc
import itertools
import time
from typing import TYPE_CHECKING

import msgspec

from core.cluster.nodes.missing import missing_ranks
from core.cluster.processes.boot import WorkerBoot, worker_name
from core.cluster.processes.channel import Channel, exit_with_parent
from core.cluster.processes.log_stream import exit_now, steady_output
from core.cluster.processes.machine import raise_descriptor_limit
from core.cluster.processes.signals import leave_signals_to_parent
from core.disk.cache import cache_root
from core.disk.disk_room import explained
from core.interfaces.control import LinesDropped, Progress, Ready, StartPhase
from core.interfaces.worker import WorkerInfo
from core.plugin.lifespans import CLEAN_LEAVE_S, FAILED_LEAVE_S, HOOK, Lifespans

if TYPE_CHECKING:
    from core.plugin.plugin_manager import PluginManager


def main() -> None:
    """Entry point of `python -m core.worker`."""
    channel = Channel.open()
    exit_with_parent()
    leave_signals_to_parent()
    raise_descriptor_limit()  # strangers at its ports hold some until they are turned away
    lifespans = Lifespans()
    boot: WorkerBoot | None = None
    try:
        boot = msgspec.json.decode(channel.boot_line(), type=WorkerBoot)
        channel.exit_at_end(lambda: lifespans.leave(None, CLEAN_LEAVE_S))
        with steady_output(lambda lines: channel.send(LinesDropped(lines))):
            run(boot, channel, lifespans)
    except Exception as error:
        lifespans.leave(error, FAILED_LEAVE_S)
        blamed = missing_ranks(error, boot.rank, boot.plan.world_size) if boot else ()
        blames = [worker_name(rank) for rank in blamed]
        # Other threads may sit in a collective that never ends.
        exit_now(channel.report_failure(explained(error, cache_root()), blames))
    finally:
        lifespans.leave(None, FAILED_LEAVE_S)  # whoever exits the interpreter


def run(boot: WorkerBoot, channel: Channel, lifespans: Lifespans) -> None:
    """Build this rank and serve until the process is ended. Enters `lifespans`, and leaves none."""
    start = time.monotonic()

    def on_phase(name: str, seconds: float) -> None:
        channel.send(StartPhase(name, seconds))

    from core.engine.build.context import RankContext
    from core.engine.build.device import open_device
    from core.engine.build.rank import build_rank
    from core.engine.build.ranks import join_ranks
    from core.engine.run.links import open_links
    from core.plugin.plugin_manager import PluginManager
    from core.wire import Wire

    device = open_device(boot.device, boot.num_threads)
    plugins = PluginManager.load(boot.config.plugins.blocklist)
    on_phase("import", time.monotonic() - start)

    enter_lifespans(boot, channel, lifespans, plugins)

    start = time.monotonic()
    comms = join_ranks(boot.config, boot.plan, boot.rank, plugins, boot.endpoints, device)
    on_phase("join ranks", time.monotonic() - start)

    # Bound before the long work, so that an address that is taken is found now.
    launch = boot.config.launch
    links = open_links(
        Wire(boot.endpoints.key),
        boot.endpoints,
        boot.plan,
        boot.rank,
        step_timeout_s=launch.step_timeout_s,
    )

    rank = build_rank(
        boot.config,
        RankContext(
            plugins=plugins,
            files=boot.files,
            plan=boot.plan,
            rank=boot.rank,
            comms=comms,
            device=device,
            local_ranks=boot.local_ranks,
            on_phase=on_phase,
            on_progress=lambda task, done, total, unit: channel.send(
                Progress(task, done, total, unit)
            ),
        ),
    )
    gc.collect()
    gc.freeze()  # nothing made until here is garbage: keep it out of every collection
    gc.set_threshold(20_000, 20, 50)
    links.await_peers(launch.startup_timeout_s)
    channel.send(Ready(rank.describe()))
    channel.heartbeat(rank.executor.heartbeat)
    rank.commit_pool()
    links.serve(rank.scheduler, rank.executor, rank.expert_balancer)


def enter_lifespans(
    boot: WorkerBoot, channel: Channel, lifespans: Lifespans, plugins: "PluginManager"
) -> None:
    """Begin what plugins run beside this rank. Raises PluginError for one that fails."""
    from core.engine.build.device import open_device

    start = time.monotonic()
    worker = WorkerInfo(
        rank=boot.rank,
        world_size=boot.plan.world_size,
        dp_rank=boot.plan.axis_index("dp", boot.rank),
        local_ranks=boot.local_ranks,
        device=boot.device,
    )
    found = plugins.worker_lifespans(boot.config, worker)
    begun = itertools.count()
    lifespans.enter(
        found,
        prepare=lambda: open_device(boot.device, boot.num_threads),  # current in that thread, too
        on_begin=lambda plugin: channel.send(
            Progress(f"{HOOK} of {plugin}", next(begun), len(found), "plugins")
        ),
    )
    if found:
        channel.send(StartPhase("plugins", time.monotonic() - start))


if __name__ == "__main__":
    main()
