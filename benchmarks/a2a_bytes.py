"""Bytes a token moves between ranks in one MoE layer, against the least possible; prints JSON.

    python -m benchmarks.a2a_bytes [--rows 64] [--ep 4 8 16]

Shapes are DeepSeek-V3's: hidden size 7168, 8 of 256 experts out of 4 of 8 groups, bfloat16 rows,
and float8 rows with scales ("fp8"). Ranks are threads; their communicators count what leaves a
rank. The least possible is computed from the routing alone: a row goes once to every other rank
that holds any of its experts, with an id (2 bytes) and a weight (4 bytes) for each expert there,
and one bfloat16 row comes back from each. "once_per_expert" is what sending a row to each of its
experts would take, as low-latency kernels do. `ratio` is ours over the least.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core.devices.select import select_row_ops
from core.interfaces.comm import Comms, Communicator
from core.interfaces.moe_a2a import A2ASpec, Dispatcher
from core.interfaces.routing import Routing
from core.ops.torch_ops import TorchOps
from core.parallel.plan import Plan
from core.testing.ranks import plan_comms, run_ranks
from plugins.moe_a2a._fixed import FixedDispatcher
from plugins.moe_a2a._options import AllGatherOptions, NcclOptions
from plugins.moe_a2a.allgather import AllGatherDispatcher
from plugins.moe_a2a.nccl import NcclDispatcher

HIDDEN, NUM_EXPERTS, BF16_BYTES, SCALE_BYTES = 7168, 256, 2, 4
ID_BYTES, WEIGHT_BYTES = 2, 4
ROUTING = Routing(
    top_k=8, scoring="sigmoid", normalise=True, num_groups=8, num_chosen_groups=4, group_top=2
)


class CountingCommunicator:
    """Counts the bytes that leave this rank; collectives as rings or pairs move them."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size, self.capturable = comm.rank, comm.size, comm.capturable
        self.num_bytes = 0
        self.num_calls = 0

    def _count(self, num_bytes: float) -> None:
        self.num_bytes += int(num_bytes)
        self.num_calls += 1

    def all_reduce(self, x: Tensor) -> Tensor:
        self._count(2 * x.nbytes * (self.size - 1) / self.size)
        return self._comm.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self._count(x.nbytes * (self.size - 1))
        return self._comm.all_gather(x, dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._count(x.nbytes * (self.size - 1) / self.size)
        return self._comm.reduce_scatter(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        self._count(x.nbytes if source == self.rank else 0)
        return self._comm.broadcast(x, source)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        row_bytes = x[:1].nbytes
        self._count(row_bytes * (sum(send_counts) - send_counts[self.rank]))
        return self._comm.all_to_all(x, send_counts, receive_counts)


def routed(rank: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(experts (T, K), weights (T, K)) of a rank's rows."""
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(num_rows, NUM_EXPERTS, generator=generator)
    bias = torch.zeros(NUM_EXPERTS)
    weights_TK, experts_TK = TorchOps().grouped_top_k(logits, bias, ROUTING)
    return experts_TK, weights_TK


def least(rank: int, ep: int, num_rows: int, *, fp8: bool) -> dict[str, float]:
    """Bytes that must leave a rank for its rows, and come back for them."""
    sent_bytes = HIDDEN + HIDDEN // 128 * SCALE_BYTES if fp8 else HIDDEN * BF16_BYTES
    copies = pairs = 0
    for experts in routed(rank, num_rows)[0].tolist():
        elsewhere = [owner for e in experts if (owner := e // (NUM_EXPERTS // ep)) != rank]
        copies += len(set(elsewhere))
        pairs += len(elsewhere)
    rows = sent_bytes + HIDDEN * BF16_BYTES
    return {
        "ranks_a_token": copies / num_rows,
        "least": (copies * rows + pairs * (ID_BYTES + WEIGHT_BYTES)) / num_rows,
        "once_per_expert": pairs * rows / num_rows,
    }


def moved(make: Callable[[A2ASpec], Dispatcher], ep: int, num_rows: int, *, fp8: bool) -> float:
    """Bytes a token that left any rank in one dispatch and combine."""

    def work(comms: Comms) -> CountingCommunicator:
        comm = CountingCommunicator(comms.axes["ep"])
        spec = A2ASpec(
            comm=comm,
            num_experts=NUM_EXPERTS,
            top_k=ROUTING.top_k,
            hidden_size=HIDDEN,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            ops=select_row_ops(torch.device("cpu")),
            max_rows=num_rows,
            phase="prefill",
            fp8=fp8,
        )
        dispatcher = make(spec)
        x_TE = torch.randn(num_rows, HIDDEN, dtype=torch.bfloat16)
        dispatched = dispatcher.dispatch(x_TE, *routed(comm.rank, num_rows), [num_rows] * ep)
        dispatcher.combine(dispatched.hidden.to(torch.bfloat16), dispatched)
        return comm

    counted = run_ranks(plan_comms(Plan(dp=ep, ep=ep)), work)
    return sum(comm.num_bytes for comm in counted) / (num_rows * ep)


def measure(ep: int, num_rows: int, *, fp8: bool) -> dict[str, Any]:
    """One line of the result."""
    bounds = [least(rank, ep, num_rows, fp8=fp8) for rank in range(ep)]
    row: dict[str, Any] = {"ep": ep, "fp8": fp8, "rows_a_rank": num_rows}
    row |= {name: round(sum(bound[name] for bound in bounds) / ep, 2) for name in bounds[0]}
    nccl = moved(lambda spec: NcclDispatcher(NcclOptions(), spec), ep, num_rows, fp8=fp8)
    row |= {"nccl": round(nccl, 1), "ratio": round(nccl / row["least"], 4)}
    fixed = moved(lambda spec: FixedDispatcher(spec, fp8=fp8), ep, num_rows, fp8=fp8)
    row |= {"nccl_fixed": round(fixed, 1), "fixed_ratio": round(fixed / row["least"], 4)}
    if not fp8:
        made = lambda spec: AllGatherDispatcher(AllGatherOptions(), spec)  # noqa: E731
        row["allgather"] = round(moved(made, ep, num_rows, fp8=False), 1)
    return row


def main() -> None:
    """Print every size of the ep axis, with and without float8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="of each rank")
    parser.add_argument("--ep", type=int, nargs="+", default=[4, 8, 16])
    arguments = parser.parse_args()
    results = [measure(ep, arguments.rows, fp8=fp8) for fp8 in (False, True) for ep in arguments.ep]
    print(json.dumps({"unit": "bytes a token and MoE layer, both ways", "results": results}))


if __name__ == "__main__":
    main()
