"""Offline rates of this engine over several GPUs of one host, with dummy weights.

    python -m benchmarks.gpu_ranks MODEL_DIR BATCHES [PROMPT_TOKENS] [NEW_TOKENS] --parallel tp2_ep2
    python -m benchmarks.gpu_ranks .gpu/models/llama8b 1,64,256 --parallel tp2 --prefill 16x2048

The cells of `benchmarks.gpu_cells`, as `benchmarks.gpu_engine` has them for one GPU, through the
loops that serve HTTP: a process for each rank, the same sockets between them. A batch is that of
each DP rank. `--parallel` is a file of conf/parallel; `--a2a` and `--comm` choose plugins.
`--unequal` measures steps in which DP ranks have unequal rows (benchmarks.dp_rows).
`--profile` prints the kernels of a decode step of the first rank, and the gaps between them. The
ratio to a peer is taken by `benchmarks.gpu_peer` in the same run.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import dp_rows, gpu_engine, gpu_profile, rank_processes
from benchmarks import gpu_cells as cells

CONF = Path(__file__).parents[1] / "conf" / "parallel"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cells.add_arguments(parser)
    parser.add_argument("--parallel", default="tp2", help="a file of conf/parallel")
    parser.add_argument("--a2a", help="moe_a2a of both phases")
    parser.add_argument("--comm", help="comm of all axes")
    parser.add_argument("--comm-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--uniform-routing", action="store_true", help="experts drawn at random")
    parser.add_argument("--max-prefill-tokens", type=int, default=16384)
    parser.add_argument("--chunked-prefill-size", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="engine.KEY")
    parser.add_argument("--device", default="cuda", help="cpu: to try the program, small shapes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--unequal", action="store_true", help="unequal rows of DP ranks")
    parser.add_argument("--rank", type=int, help="this process is one rank; set by the first one")
    parser.add_argument("--folder", help="where ranks meet; set by the first process")
    return parser.parse_args()


def configuration(arguments: argparse.Namespace) -> Any:
    """As a server of these cells would be configured."""
    from omegaconf import OmegaConf

    from core.settings.config import PluginChoice

    shape, name = gpu_engine.shape_of(Path(arguments.model_dir))
    config = gpu_engine.configuration(arguments, shape, name)
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{arguments.parallel}.yaml"))
    config = replace(config, parallel=replace(config.parallel, **settings))
    if arguments.a2a:
        choice = PluginChoice(name=arguments.a2a)
        config = replace(config, moe_a2a=replace(config.moe_a2a, prefill=choice, decode=choice))
    if arguments.comm:
        choice = PluginChoice(name=arguments.comm, options=arguments.comm_options)
        config = replace(config, comm=replace(config.comm, tp=choice, ep=choice))
    return config


def main() -> None:
    arguments = parse()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    parallel = configuration(arguments).parallel
    sys.exit(rank_processes.run("benchmarks.gpu_ranks", parallel.tp))


def run_rank(arguments: argparse.Namespace) -> None:
    """Build one rank and run the cells, or follow who does."""
    from core.devices.native_dtypes import native_dtypes
    from core.engine.build.context import RankContext
    from core.engine.build.device import open_device
    from core.engine.build.rank import build_rank
    from core.engine.build.ranks import join_ranks
    from core.engine.local.offline import OfflineLeader
    from core.engine.run.links import FollowerLinks, open_links
    from core.plugin.plugin_manager import PluginManager
    from core.resolve import resolve
    from core.sources.files import resolve_files
    from core.wire import Wire

    config, rank = configuration(arguments), arguments.rank
    cuda = arguments.device == "cuda"
    device = open_device(f"cuda:{rank}" if cuda else "cpu", 4 if cuda else 1)
    plugins = PluginManager.load(config.plugins.blocklist)
    files = resolve_files(config.model, plugins, lambda *_: None)
    resolved = resolve(config, plugins, files, arguments.device, native_dtypes())
    config, plan = resolved.config, resolved.plan
    endpoints = endpoints_in(arguments.folder, plan.dp)
    begin = time.perf_counter()
    comms = join_ranks(config, plan, rank, plugins, endpoints, device)
    links = open_links(Wire(endpoints.key), endpoints, plan, rank, step_timeout_s=120.0)
    context = RankContext(
        plugins=plugins,
        files=files,
        plan=plan,
        rank=rank,
        comms=comms,
        device=device,
        local_ranks=plan.world_size,
        on_phase=lambda *_: None,
        on_progress=lambda *_: None,
    )
    built = build_rank(config, context)
    links.await_peers(300)
    common = {
        "engine": "nodeweave",
        "model": config.model.name,
        "parallel": arguments.parallel,
        "a2a": config.moe_a2a.decode.name if plan.ep > 1 else None,
        "comm": config.comm.tp.name,
    }
    put = cells.put if rank == 0 else lambda row: None
    startup_s = round(time.perf_counter() - begin, 1)
    put(common | {"startup_s": startup_s, "cuda_graphs": built.cuda_graphs})
    if isinstance(links, FollowerLinks):
        links.serve(built.scheduler, built.executor, built.expert_balancer)
    leader = OfflineLeader(built, links.followers, links.lockstep)
    if arguments.profile:
        for batch in cells.batches_of(arguments):
            profile(leader, batch, arguments.isl, partial(print_profile, common, rank))
    elif arguments.unequal:
        dp_rank, vocab_size = plan.axis_index("dp", rank), resolved.spec.vocab_size
        for row in dp_rows.measure(leader, dp_rank, plan.dp, vocab_size, arguments):
            put(common | row)
    else:
        for row in cells.measure(partial(generate, leader, resolved.spec.vocab_size), arguments):
            put(common | row)
    os._exit(0)  # other threads may sit in a collective that never ends


def endpoints_in(folder: str, num_dp: int) -> Any:
    """Sockets and the place where ranks meet, in a folder of this run."""
    from core.interfaces.control import Endpoints

    return Endpoints(
        engine=f"ipc://{folder}/engine",
        lockstep=f"ipc://{folder}/lockstep",
        plans=[f"ipc://{folder}/plans-{dp_rank}" for dp_rank in range(num_dp)],
        store=f"{folder}/rendezvous",
    )


def generate(leader: Any, vocab_size: int, prompts: list[list[int]], new_tokens: int) -> None:
    """All of this DP rank's answers; every leader calls this at the same time."""
    from core.interfaces.messages import Generate, SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        ids = [token % vocab_size for token in prompt]
        leader.send(Generate(request_id=str(index), prompt_ids=ids, sampling=params))
    outputs = leader.run()
    assert sum(len(output.token_ids) for output in outputs) == len(prompts) * new_tokens


def profile(leader: Any, batch: int, isl: int, show: Any) -> None:
    """Decode steps of one batch size under the profiler of each leader."""
    from core.interfaces.messages import Abort, Generate, SamplingParams

    params = SamplingParams(max_tokens=4096, temperature=0.0, ignore_eos=True)
    names = [str(index) for index in range(batch)]
    for index, name in enumerate(names):
        prompt = [7 + (position * 13 + index) % 90 for position in range(isl)]
        leader.send(Generate(request_id=name, prompt_ids=prompt, sampling=params))
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in leader.step()}
    for _ in range(8):
        leader.step()
    steps = gpu_engine.PROFILED_STEPS
    events = gpu_profile.traced(lambda: [leader.step() for _ in range(steps)])
    show({"cell": "decode", "batch": batch, "isl": isl} | gpu_profile.summarise(events, steps))
    leader.send(Abort(names))
    leader.run()


def print_profile(common: dict[str, Any], rank: int, row: dict[str, Any]) -> None:
    if rank == 0:
        print(gpu_profile.table(row), file=sys.stderr, flush=True)
        cells.put(common | row)


if __name__ == "__main__":
    main()
