"""A sampling step of ranks that share the vocabulary: from gathered logits, and from each rank's.

    python -m benchmarks.cut_sampler [--ranks 2] [--comm gloo] [--rows 1,16,64] [--vocab 128256]

Prints a JSON line for each kind of request (benchmarks.sampler), number of rows and vocabulary: the
least and median milliseconds from a rank's part of the logits to the ids on all ranks (and
log-probabilities on one), and the bytes of a row that a rank sends to each other rank, both ways.
`gloo` runs on CPUs, `nccl` and `symm_mem` on as many GPUs of this host. Ends with 1 where ids
differ.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rank_processes
from benchmarks.sampler import KINDS, Cell, integers
from core.engine.sample.cut_vocabulary import CutVocabulary
from core.engine.sample.logprobs import sampled_logprobs
from core.interfaces.comm import Communicator, connect
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.parallel.sharding import Sharding
from core.plugin.plugin_manager import PluginManager
from core.settings.config import PluginChoice

WARM_UP, REPEATS = 3, 15


class Counting:
    """A communicator that counts the bytes which a rank sends to each other one."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.num_bytes = 0

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.num_bytes += x.nbytes
        return self._comm.all_gather(x, dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        self.num_bytes += x.nbytes
        return self._comm.broadcast(x, source)


class CutCell(Cell):
    """A batch whose logits are cut over ranks; the same requests on every rank."""

    def __init__(
        self, kind: str, num_rows: int, vocab_size: int, device: torch.device, comm: Communicator
    ) -> None:
        super().__init__(kind, num_rows, vocab_size, device)
        self.comm = Counting(comm)
        shard = Sharding.over(comm).padded(0)
        first, stop = shard.bounds(vocab_size)
        self.part_RL = torch.zeros((num_rows, shard.local_size(vocab_size)), device=device)
        self.part_RL[:, : stop - first] = self.logits_RV[:, first:stop]
        counting: Any = self.comm
        self.over = CutVocabulary(counting, vocab_size, first_id=first, num_tokens=stop - first)

    def gathered(self) -> Tensor:
        """One rank chooses for all."""
        logits_RV = self.comm.all_gather(self.part_RL, -1)[:, : self.over.vocab_size]
        ids_R = torch.empty(len(self.slots), dtype=torch.int64, device=self.device)
        if self.comm.rank == 0:
            plan = self.sampler.prepare(self.slots, self.positions)
            ids_R = self.sampler.sample(plan, logits_RV, self.tokens_SL)
        ids_R = self.comm.broadcast(ids_R, 0)
        if self.comm.rank == 0 and self.asks_logprobs:
            sampled_logprobs(logits_RV, ids_R, self.num_top)
        return ids_R

    def cut(self) -> Tensor:
        """All ranks together."""
        plan = self.sampler.prepare(self.slots, self.positions, self.over)
        ids_R = self.sampler.sample(plan, self.part_RL, self.tokens_SL)
        if self.asks_logprobs:
            sampled_logprobs(self.part_RL, ids_R, self.num_top, self.over)
        return ids_R


def measure(cell: CutCell) -> tuple[dict[str, Any], int]:
    """Both ways in turn: milliseconds and bytes of a row, and how many ids differ."""
    ways: dict[str, Callable[[], Tensor]] = {"gathered": cell.gathered, "cut": cell.cut}
    times: dict[str, list[float]] = {name: [] for name in ways}
    ids: dict[str, Tensor] = {}
    row: dict[str, Any] = {}
    for repeat in range(WARM_UP + REPEATS):
        for name, way in ways.items():
            cell.comm.all_gather(torch.zeros(1, device=cell.device), 0)  # all begin together
            wait(cell.device)
            cell.comm.num_bytes = 0
            begin = time.perf_counter()
            ids[name] = way()
            wait(cell.device)
            if repeat >= WARM_UP:
                times[name].append((time.perf_counter() - begin) * 1e3)
            row[f"{name}_row_bytes"] = cell.comm.num_bytes // len(cell.slots)
    for name in ways:
        row[f"{name}_ms_min"] = round(min(times[name]), 3)
        row[f"{name}_ms_median"] = round(statistics.median(times[name]), 3)
    return row, int((ids["gathered"] != ids["cut"]).sum())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_rank(options: argparse.Namespace) -> int:
    """The same cells in the same order on every rank."""
    rank, size = options.rank, options.ranks
    on_gpu = options.comm != "gloo"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = open_mesh(
        Plan(tp_attn=size, tp_expert=size),
        rank,
        torch_backends={"tp": "nccl" if on_gpu else "gloo"},
        rendezvous=Path(options.folder) / "rendezvous",
        timeout_s=60,
        device=device,
    )
    choice = PluginChoice(name=options.comm)
    comms = connect(
        mesh.groups, {"tp": PluginManager.load().table("comm").create(choice, key="comm")}
    )
    num_different = 0
    for vocab_size, num_rows in itertools.product(options.vocab, options.rows):
        for kind in options.kinds.split(","):
            with torch.inference_mode():
                cell = CutCell(kind, num_rows, vocab_size, device, comms.axes["tp"])
                result, num_cell_different = measure(cell)
            num_different += num_cell_different
            if rank > 0:
                continue
            row = {"kind": kind, "rows": num_rows, "vocab": vocab_size, "ranks": size}
            row |= {"comm": options.comm, "different_ids": num_cell_different} | result
            print(json.dumps({"benchmark": "cut_sampler", **row}), flush=True)
    return int(num_different > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--comm", choices=("gloo", "nccl", "symm_mem"), default="gloo")
    parser.add_argument("--rows", type=integers, default=[1, 16, 64])
    parser.add_argument("--vocab", type=integers, default=[128256])
    parser.add_argument("--kinds", default=",".join([*KINDS, "mixed"]))
    parser.add_argument("--rank", type=int, help="set by the first process")
    parser.add_argument("--folder", help="set by the first process")
    options = parser.parse_args()
    if options.rank is not None:
        torch.set_num_threads(1)
        sys.exit(run_rank(options))
    sys.exit(rank_processes.run("benchmarks.cut_sampler", options.ranks))


if __name__ == "__main__":
    main()
