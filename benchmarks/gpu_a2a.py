"""What carries rows to experts and back between the GPUs of one host: microseconds of a layer.

    python -m benchmarks.gpu_a2a [--ranks 2] [--shapes deepseek_v3 qwen3_30b_a3b] [--rows 1 64 4096]
    python -m benchmarks.gpu_a2a --write core/gpu_tools/tuned/moe_a2a.json

Every rank has as many rows, routed at random, as with DP attention. Prints a JSON line for each
shape and number of rows: by plugin the time of dispatch and combine (`us`) and of these with the
experts between (`layer_us`), in CUDA graphs; those that can't be captured are launched one by one,
and stand under `eager_us` and `eager_layer_us`. `local` has all rows on every rank, as tensor
parallelism does, and adds sums up. Results are compared with allgather's. A plugin that can't be
built is left out, and said. `--write` puts times of graphs into the table that moe_a2a=auto reads.
Shape legend: T rows of a rank, A rows of all ranks, K experts of a row, E hidden size, L experts of
a rank.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import rank_processes
from benchmarks.gpu_collectives import microseconds

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
PLUGINS = ("local", "allgather", "nccl", "symm_mem", "deepep")
SHAPES = ("deepseek_v3", "qwen3_30b_a3b")
_EAGER_CALLS = 12
_LARGEST_ERROR = 0.05  # of results against allgather's, whose rows travel as bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--plugins", nargs="+", default=list(PLUGINS))
    parser.add_argument("--comm", help="of the ep axis; default: symm_mem on GPUs, gloo on CPUs")
    parser.add_argument("--device", default="cuda", help="cpu: to try the program, small shapes")
    parser.add_argument("--write", type=Path, help="a table to put the times in")
    parser.add_argument("--rank", type=int, help="set by the first process")
    parser.add_argument("--folder", help="set by the first process")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    sys.exit(rank_processes.run("benchmarks.gpu_a2a", arguments.ranks))


def run_rank(arguments: argparse.Namespace) -> None:
    """The same shapes, rows and plugins in the same order on every rank."""
    import torch

    from core.interfaces.comm import connect
    from core.parallel.mesh import open_mesh
    from core.parallel.plan import Plan
    from core.plugin.plugin_manager import PluginManager
    from core.settings.config import PluginChoice

    rank, size, on_gpu = arguments.rank, arguments.ranks, arguments.device == "cuda"
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    plugins = PluginManager.load()
    name = arguments.comm or ("symm_mem" if on_gpu else "gloo")
    backend = plugins.table("comm").create(PluginChoice(name=name), key="comm.ep")
    mesh = open_mesh(
        Plan(dp=size, ep=size),
        rank,
        torch_backends={"ep": backend.torch_backend},
        rendezvous=Path(arguments.folder) / "rendezvous",
        timeout_s=120,
        device=device if backend.torch_backend == "nccl" else None,
    )
    comm = connect({"ep": mesh.group("ep")}, {"ep": backend}).axes["ep"]
    found = []
    for shape in arguments.shapes:
        for row in rows_of_shape(shape, plugins, comm, device, arguments):
            found.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
    if rank == 0 and arguments.write is not None:
        write_table(arguments.write, [table_row(row, device) for row in found])
    if on_gpu:
        torch.cuda.synchronize()
    mesh.close()


def rows_of_shape(
    name: str, plugins: Any, comm: Any, device: Any, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each number of rows, as soon as it is measured."""
    from dataclasses import replace

    from benchmarks.gpu_moe_tiles import SHAPES as KNOWN
    from benchmarks.gpu_moe_tiles import Shape

    shape = Shape(16, 256, 128, 4) if name == "tiny" else KNOWN[name]
    shape = replace(shape, ep=comm.size)
    experts = experts_of(shape, device)
    dispatchers = {}
    for plugin in arguments.plugins:
        made = build(plugin, plugins, shape, comm, device, max(arguments.rows))
        if isinstance(made, str):
            print(f"{plugin}: {made}", file=sys.stderr, flush=True)
        else:
            dispatchers[plugin] = made
    for num_rows in arguments.rows:
        row: dict[str, Any] = {
            "shape": name,
            "ranks": comm.size,
            "hidden": shape.hidden,
            "fp8": shape.fp8,
            "rows": num_rows,
        }
        right = None
        for plugin, dispatcher in dispatchers.items():
            layer = Layer(shape, dispatcher, experts, comm, device, num_rows, plugin == "local")
            result = layer.whole().float()
            if plugin == "allgather":
                right = result
            elif right is not None and plugin != "local":
                error = float((result - right).norm() / right.norm())
                assert error < _LARGEST_ERROR, f"{plugin}: an error of {error:.3f}"
            captured = dispatcher.capturable and device.type == "cuda"
            timed: Callable[[Callable[[], Any]], float] = microseconds if captured else eager
            prefix = "" if captured else "eager_"
            for kind, call in (("us", layer.bare), ("layer_us", layer.whole)):
                row.setdefault(prefix + kind, {})[plugin] = round(timed(call), 2)
        yield row


def build(plugin: str, plugins: Any, shape: Any, comm: Any, device: Any, most_rows: int) -> Any:
    """A dispatcher of decode steps, or why there is none."""
    import torch

    from core.devices.select import select_row_ops
    from core.errors import NodeweaveError
    from core.interfaces.moe_a2a import A2ASpec
    from core.settings.config import PluginChoice

    spec = A2ASpec(
        comm=comm,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        dtype=torch.bfloat16,
        device=device,
        ops=select_row_ops(device),
        max_rows=most_rows,
        phase="decode",
        fp8=shape.fp8,
    )
    options = {"buffer_mib": 4096} if plugin == "symm_mem" else {}
    choice = PluginChoice(name=plugin, options=options)
    try:
        return plugins.table("moe_a2a").create(choice, spec, key="moe_a2a.decode")
    except NodeweaveError as error:
        return str(error).splitlines()[0]


def experts_of(shape: Any, device: Any) -> Any:
    """This rank's experts, with weights of noise."""
    import torch

    from core.devices.select import select_ops
    from core.interfaces.weights import BlockFp8

    ops = select_ops(device)
    generator = torch.Generator(device=device).manual_seed(1)

    def matrix(outputs: int, inputs: int) -> Any:
        values = torch.randn(outputs, inputs, device=device, generator=generator) * inputs**-0.5
        if not shape.fp8:
            return values.bfloat16()
        blocks = (-(-outputs // 128), -(-inputs // 128))
        scales = torch.full(blocks, 2.0**-6, device=device)
        return BlockFp8((values * 2.0**6).to(torch.float8_e4m3fn), scales)

    one = (matrix(2 * shape.middle, shape.hidden), matrix(shape.hidden, shape.middle))
    return ops.experts((one for _ in range(shape.num_local)), shape.num_local, torch.bfloat16)


class Layer:
    """One layer's rows and routes of a rank, and what is done with them."""

    def __init__(
        self,
        shape: Any,
        dispatcher: Any,
        experts: Any,
        comm: Any,
        device: Any,
        num_rows: int,
        everywhere: bool,
    ) -> None:
        """`everywhere`: all ranks have all rows already."""
        import torch

        self._dispatcher, self._experts, self._comm = dispatcher, experts, comm
        self._everywhere = everywhere
        self._counts = [num_rows * comm.size] if everywhere else [num_rows] * comm.size
        generator = torch.Generator().manual_seed(0 if everywhere else 1 + comm.rank)
        total = self._counts[0]
        ids_TK = torch.rand(total, shape.num_experts, generator=generator).topk(shape.top_k).indices
        if everywhere:
            first = comm.rank * shape.num_local
            here = (ids_TK >= first) & (ids_TK < first + shape.num_local)
            ids_TK = torch.where(here, ids_TK - first, -1)
        self._x_TE = torch.randn(total, shape.hidden, generator=generator).to(device).bfloat16()
        self._ids_TK = ids_TK.to(device)
        self._weights_TK = torch.rand(total, shape.top_k, generator=generator).to(device)
        self._output = torch.zeros_like(self._dispatch().hidden, dtype=torch.bfloat16)

    def _dispatch(self) -> Any:
        return self._dispatcher.dispatch(self._x_TE, self._ids_TK, self._weights_TK, self._counts)

    def _combine(self, output: Any, dispatched: Any) -> Any:
        sums = self._dispatcher.combine(output, dispatched)
        return self._comm.all_reduce(sums) if self._everywhere else sums

    def bare(self) -> Any:
        """There and back."""
        return self._combine(self._output, self._dispatch())

    def whole(self) -> Any:
        """There, through the experts and back."""
        dispatched = self._dispatch()
        return self._combine(self._experts(dispatched), dispatched)


def eager(call: Callable[[], Any]) -> float:
    """Microseconds of one call, launched by the host; the middle of some."""
    import torch

    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    call()
    found = []
    for _ in range(_EAGER_CALLS):
        finish()
        begin = time.perf_counter()
        call()
        finish()
        found.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(found)


def table_row(row: dict[str, Any], device: Any) -> dict[str, Any]:
    """As plugins.moe_a2a._measured reads it."""
    from core.gpu_tools import tuning

    us = {name: time_us for name, time_us in row.get("us", {}).items() if name != "local"}
    facts = {key: row[key] for key in ("ranks", "hidden", "fp8", "rows")}
    return {"device": tuning.table_of(device), "one_host": True} | facts | {"us": us}


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same device, ranks, shape and number of rows."""
    known = json.loads(path.read_text()) if path.is_file() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("device", "one_host", "ranks", "hidden", "fp8", "rows"))

    merged = {key(row): row for row in [*known, *rows]}
    lines = ",\n".join(json.dumps(merged[found]) for found in sorted(merged))
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
